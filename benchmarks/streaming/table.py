"""What was measured, as a table."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["", f"{'model':6}{'batch':8}{'cap':>5}{'tok/s':>8}{'step s':>8}{'copy s':>8}{'waited':>8}{'stay':>6}"
             f"{'peak':>7}{'share':>7}"]  # fmt: skip
    base = {(row["model"], row["batch"], row["fp8"]): row["tokens_per_s"] for row in rows
            if row.get("resident_engine") and "tokens_per_s" in row}  # fmt: skip
    for row in (row for row in rows if row["stage"] == "steps"):
        if "tokens_per_s" not in row:
            lines.append(f"{row['model']:6}{row['batch']:8}{row['cap_gib'] or '-':>5} {row['status']}")
            continue
        whole = base.get((row["model"], row["batch"], row["fp8"]))
        share = f"{row['tokens_per_s'] / whole:.1%}" if whole else ""
        copied, waited = (f"{row[key]:.3f}" if row[key] is not None else "-" for key in ("copy_s", "waited_s"))
        stay = "all" if row["resident"] is None else row["resident"]
        how = f"  {row['optim']}{' fp8' if row['fp8'] else ''}"
        speed = f"{row['tokens_per_s']:>8,}{row['step_s']:>8.3f}{copied:>8}{waited:>8}"
        lines.append(f"{row['model']:6}{row['batch']:8}{row['cap_gib'] or '-':>5}{speed}{stay:>6}{row['peak_gib']:>7}"
                     f"{share:>7}{how}")  # fmt: skip
    wrong = [row for row in rows if row["stage"] == "equality" and not row["as_it_must_be"]]
    checked = sum(row["stage"] == "equality" for row in rows)
    lines.append(f"equality: {checked - len(wrong)} of {checked} as they must be")
    for row in (row for row in rows if row["stage"] == "host"):
        over, with_rest = row["resident_set_over_slabs"], row["with_embedding_and_shell_over_slabs"]
        lines.append(f"host memory of {row['model']}: {row['slabs_gib']} GiB of slabs, {over:+.2%} over that "
                     f"({with_rest:+.2%} with the embedding and all else)")  # fmt: skip
    return "\n".join(lines)
