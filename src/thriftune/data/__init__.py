"""From sources to batches: rows -> conversations -> tokens and mask -> audit -> steps."""

from thriftune.data.audit import audit, audit_lines, example_segments
from thriftune.data.batches import Batch, StepOrder, largest_step, micro_batches, shared_out
from thriftune.data.encoding import (
    Encoded,
    Example,
    encode_answer,
    encode_prompt,
    encode_prompts,
    encode_rows,
    stop_token_ids,
)
from thriftune.data.formats import Conversation, to_conversation
from thriftune.data.lengths import RowLengths, measure_lengths
from thriftune.data.prepare import PreparedData, prepare
from thriftune.data.sources import Rows, load_file, load_rows

__all__ = [
    "Batch",
    "Conversation",
    "Encoded",
    "Example",
    "PreparedData",
    "RowLengths",
    "Rows",
    "StepOrder",
    "audit",
    "audit_lines",
    "encode_answer",
    "encode_prompt",
    "encode_prompts",
    "encode_rows",
    "example_segments",
    "largest_step",
    "load_file",
    "load_rows",
    "measure_lengths",
    "micro_batches",
    "prepare",
    "shared_out",
    "stop_token_ids",
    "to_conversation",
]
