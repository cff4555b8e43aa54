"""cuDNN's attention over segments of different lengths (its ragged layout), through NVIDIA's cudnn-frontend.

It reads queries, keys and values where the projection left them, and writes gradients where the next product reads
them. A plan is built for a number of segments, a longest one and a number of tokens, all rounded up, so random lengths
need few plans. Missing segments have length 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thriftune.engine.attention import Kind
from thriftune.engine.packing import Segments
from thriftune.kernels.launch import next_power_of_two

SHORTEST = 256
TOKENS_MULTIPLE = 1024


@dataclass(frozen=True)
class _Bounds:
    """What a plan is good for: so many segments, the longest of so many tokens, so many tokens in all."""

    count: int
    longest: int
    tokens: int

    @classmethod
    def of(cls, segments: Segments) -> _Bounds:
        longest = max(SHORTEST, next_power_of_two(segments.longest))
        tokens = -(-segments.tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
        return cls(next_power_of_two(len(segments.lengths)), longest, tokens)


@dataclass(frozen=True)
class _Place:
    """Of the rows (T, heads, size) of a tensor: what a plan depends on."""

    heads: int
    size: int
    stride: int  # elements from one token to the next

    @classmethod
    def of(cls, rows_THK: Tensor) -> _Place:
        return cls(rows_THK.shape[1], rows_THK.shape[2], rows_THK.stride(0))


@dataclass
class _Plan:
    graph: Any
    places: tuple[Any, ...]  # of the tensors, in the order they are handed in
    workspace_bytes: int


@dataclass
class CudnnAttention:
    """One for a device: it holds the plans, and the offsets of the batch at hand."""

    name: str = "cudnn ragged"
    _handle: Any = None
    _plans: dict[Any, _Plan] = field(default_factory=dict)
    _offsets: dict[int, Tensor] = field(default_factory=dict)
    _lengths_S: Tensor | None = None  # noqa: N815
    _of: Segments | None = None

    def forward(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, kind: Kind, out_THK: Tensor
    ) -> Tensor:
        tensors = (q_THK, k_TGK, v_TGK, out_THK)
        stats_TH1 = torch.empty(*q_THK.shape[:2], 1, dtype=torch.float32, device=q_THK.device)
        self._run("forward", _build_forward, (*tensors, stats_TH1), segments, kind)
        return stats_TH1

    def backward(
        self,
        dout_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        kept: Tensor,
        segments: Segments,
        kind: Kind,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        tensors = (q_THK, k_TGK, v_TGK, out_THK, dout_THK, kept, *gradients)
        self._run("backward", _build_backward, tensors, segments, kind)

    def _run(self, name: str, build: Any, tensors: tuple[Tensor, ...], segments: Segments, kind: Kind) -> None:
        import cudnn

        if self._handle is None:
            self._handle = cudnn.create_handle()
        bounds = _Bounds.of(segments)
        places = tuple(_Place.of(tensor) for tensor in tensors)
        window = kind.window_of(segments)
        key = (name, bounds, places, kind.scale, window, tensors[0].dtype)
        # Without the device PyTorch asks the driver how many there are, at every call.
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
        cudnn.set_stream(handle=self._handle, stream=stream)
        if key not in self._plans:
            try:
                self._plans[key] = build(cudnn, self._handle, bounds, places, kind.scale, window, tensors[0])
            except cudnn.cudnnGraphNotSupportedError as error:  # which is no RuntimeError of its own accord
                raise RuntimeError(f"cuDNN has no plan for this: {error}") from None
        plan = self._plans[key]
        if self._of is not segments:
            self._of, self._offsets, self._lengths_S = segments, {}, _lengths(segments, bounds.count)
        offsets = [self._offset(segments, bounds.count, place.stride) for place in places]
        given = (*tensors, *offsets, self._lengths_S)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=tensors[0].device)
        plan.graph.execute(dict(zip(plan.places, given, strict=True)), workspace, handle=self._handle)

    def _offset(self, segments: Segments, count: int, stride: int) -> Tensor:
        """Elements before each segment; those that are missing start where the last one ends."""
        if stride not in self._offsets:
            starts = segments.starts_S1
            missing = starts[-1:].expand(count + 1 - starts.shape[0])
            self._offsets[stride] = torch.cat((starts, missing)).long() * stride
        return self._offsets[stride]


def _lengths(segments: Segments, count: int) -> Tensor:
    starts = segments.starts_S1
    lengths = torch.zeros(count, dtype=torch.int32, device=starts.device)
    lengths[: len(segments.lengths)] = starts[1:] - starts[:-1]
    return lengths


class _Graph:
    """A graph of the frontend in the making: ragged tensors in the order they are handed in."""

    def __init__(self, cudnn: Any, handle: Any, bounds: _Bounds, like: Tensor) -> None:
        kinds = cudnn.data_type
        self.cudnn, self.bounds, count = cudnn, bounds, bounds.count
        self.kind = kinds.BFLOAT16 if like.dtype == torch.bfloat16 else kinds.HALF
        self.graph = cudnn.pygraph(
            io_data_type=self.kind,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=handle,
        )
        self.lengths = self.graph.tensor(
            name="lengths", dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.INT32
        )
        self.offsets: list[Any] = []

    def sizes(self, place: _Place) -> tuple[list[int], list[int]]:
        longest = self.bounds.longest
        dim = [self.bounds.count, place.heads, longest, place.size]
        return dim, [longest * place.stride, place.size, place.stride, 1]

    def offset(self) -> Any:
        name, kind = f"offset {len(self.offsets)}", self.cudnn.data_type.INT64
        made = self.graph.tensor(name=name, dim=[self.bounds.count + 1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind)
        self.offsets.append(made)
        return made

    def tensor(self, name: str, place: _Place, kind: Any = None) -> Any:
        dim, stride = self.sizes(place)
        made = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=kind or self.kind)
        made.set_ragged_offset(self.offset())
        return made

    def output(self, made: Any, place: _Place, kind: Any = None) -> None:
        dim, stride = self.sizes(place)
        made.set_output(True).set_dim(dim).set_stride(stride)
        if kind is not None:
            made.set_data_type(kind)
        made.set_ragged_offset(self.offset())

    def build(self, tensors: tuple[Any, ...]) -> _Plan:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([self.cudnn.heur_mode.A])
        self.graph.check_support()
        self.graph.build_plans()
        return _Plan(self.graph, (*tensors, *self.offsets, self.lengths), max(1, self.graph.get_workspace_size()))

    def options(self, scale: float, window: int | None) -> dict[str, Any]:
        found = {
            "attn_scale": scale,
            "use_padding_mask": True,
            "seq_len_q": self.lengths,
            "seq_len_kv": self.lengths,
            "use_causal_mask": True,
        }
        return found if window is None else {**found, "sliding_window_length": window}


def _build_forward(
    cudnn: Any,
    handle: Any,
    bounds: _Bounds,
    places: tuple[_Place, ...],
    scale: float,
    window: int | None,
    like: Tensor,
) -> _Plan:
    building = _Graph(cudnn, handle, bounds, like)
    q, k, v = (building.tensor(name, place) for name, place in zip("qkv", places[:3], strict=True))
    options = building.options(scale, window)
    out, stats = building.graph.sdpa(name="forward", q=q, k=k, v=v, generate_stats=True, **options)
    building.output(out, places[3])
    building.output(stats, places[4], cudnn.data_type.FLOAT)
    return building.build((q, k, v, out, stats))


def _build_backward(
    cudnn: Any,
    handle: Any,
    bounds: _Bounds,
    places: tuple[_Place, ...],
    scale: float,
    window: int | None,
    like: Tensor,
) -> _Plan:
    building = _Graph(cudnn, handle, bounds, like)
    names = ("q", "k", "v", "out", "dout")
    q, k, v, out, dout = (building.tensor(name, place) for name, place in zip(names, places[:5], strict=True))
    stats = building.tensor("stats", places[5], cudnn.data_type.FLOAT)
    # Without these the workspace would be for `count` segments of the longest length.
    totals = {"max_total_seq_len_q": bounds.tokens, "max_total_seq_len_kv": bounds.tokens}
    options = {**building.options(scale, window), **totals}
    gradients = building.graph.sdpa_backward(name="backward", q=q, k=k, v=v, o=out, dO=dout, stats=stats, **options)
    for gradient, place in zip(gradients, places[6:], strict=True):
        building.output(gradient, place)
    return building.build((q, k, v, out, dout, stats, *gradients))
