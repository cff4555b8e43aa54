"""What the server of a comparison's processes imports before it forks: the libraries, and nothing that computes."""

from thriftune.machine import quiet_libraries


def _import_quietly() -> None:
    quiet_libraries()
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import thriftune.compare.cell  # noqa: F401


_import_quietly()
