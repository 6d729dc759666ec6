"""Attaches memories to the self-attention of a Hugging Face model, with hooks; no weight of it is touched.

The memory reads the hidden state after the input norm. Deltas of q, k and v are added to their projections, before the
split into heads, norm and rope; that of o to the output projection, before the residual and any post-attention norm.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamamem.errors import LlamamemError
from llamamem.formats.state import MEMORY as MEMORY_KIND
from llamamem.formats.state import Identity, State, read_state, write_state
from llamamem.reference.adapter import Adapter, Layer, read_adapter
from llamamem.reference.torch_memory import FROZEN, LIVE, MemoryState

FAULTS = ("skip-write", "lost-source", "shift-counter")


@dataclass(frozen=True)
class Fault:
    """One token goes wrong in one layer, for the proof of a proof. `token` counts all that went through since attach.

    `skip-write`: its write to the matrices is left out; `lost-source`: before it, the previous source is zero;
    `shift-counter`: before it, the counter is one too high.
    """

    kind: str
    layer: int
    token: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """KIND:LAYER:TOKEN."""
        kind, *where = text.split(":")
        if kind not in FAULTS or len(where) != 2 or not all(number.isdecimal() for number in where):
            raise LlamamemError(
                f"--inject {text}: give KIND:LAYER:TOKEN, such as skip-write:3:100; kinds: {', '.join(FAULTS)}"
            )
        return cls(kind, *map(int, where))


class Attached:
    """The memories of a model: layers, and their state, which goes on with every forward pass.

    `frozen`: it is read and not written to. `scale`: a factor of the deltas, 0 is the base. `norms`: when a list, each
    pass appends the L2 norms of its deltas, {layer: {head: [B, T]}}. `needs_all`: a pass must be asked for the logits
    of all tokens, since a layer with a memory has no others: one of Gemma 4 that shares the keys of an earlier one.
    """

    def __init__(self, model: nn.Module, adapter: Adapter):
        self.model = model
        self.adapter = adapter
        self.layers = nn.ModuleDict({str(layer): memory for layer, memory in adapter.layers.items()})
        self.frozen = False
        self.scale = 1.0
        self.norms: list[dict[int, dict[str, Tensor]]] | None = None
        self.faults: list[Fault] = []
        self.seen = dict.fromkeys(adapter.layers, 0)  # tokens that went through since the beginning, by layer
        self._mask: Tensor | None = None
        self._state: dict[int, MemoryState] = {}
        self._deltas: dict[int, dict[str, Tensor]] = {}
        self._hooks: list[Any] = []
        attention = attention_layers(model)
        self.layers.to(next(model.parameters()).device)
        for layer, memory in adapter.layers.items():
            _check_fits(layer, memory, attention)
        self.needs_all = any(getattr(attention[layer], "is_kv_shared_layer", False) for layer in adapter.layers)
        for layer, memory in adapter.layers.items():
            self._hook(layer, memory, attention[layer])

    # state

    @property
    def state(self) -> dict[int, MemoryState]:
        """The memory after what went through so far, by layer; empty before the first pass."""
        return dict(self._state)

    @state.setter
    def state(self, state: dict[int, MemoryState]) -> None:
        self._state = dict(state)

    def reset(self) -> None:
        """The memory is empty; the next pass may have another number of sequences."""
        self._state = {}

    def detach(self) -> None:
        """Cuts the state from the graph of the passes so far, for truncated back-propagation."""
        self._state = {layer: state.detach() for layer, state in self._state.items()}

    def remove(self) -> None:
        """Takes all hooks off: the model is the base again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Within it, each pass has this mask [B, T] of LIVE, FROZEN and PADDING."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None

    def export_state(self, identity: Identity, row: int = 0) -> State:
        """The memory of one sequence as the server's memory-only files hold it."""
        shape = self.adapter.shape
        states = [self._state.get(int(i)) or self._fresh(int(i), 1) for i in self.layers]
        return State(
            S=torch.stack([s.S[row] for s in states])[None].detach().cpu().numpy(),
            prev=torch.stack([s.prev[row] for s in states])[None].detach().cpu().numpy(),
            tokens_written=torch.stack([s.n[row] for s in states])[None].cpu().numpy(),
            chunk=shape.chunk,
            semantics=shape.semantics,
            sidecar_sha256=identity.sidecar_sha256,
            base_sha256=identity.base_sha256,
        )

    def import_state(self, state: State) -> None:
        """Puts the memory of a state of one sequence in, batch 1. Raises LlamamemError if its shape is another."""
        shape = self.adapter.shape
        found = (state.layers, state.heads, state.states, state.rank, state.chunk, state.semantics)
        want = (len(self.layers), shape.heads, shape.states, shape.rank, shape.chunk, shape.semantics)
        if found != want:
            raise LlamamemError(
                f"the state has (layers, heads, states, rank, chunk, semantics) {found}, the adapter {want}",
                reason="state-shape",
            )
        device = next(self.layers.parameters()).device
        self._state = {
            int(layer): MemoryState(
                torch.from_numpy(state.S[:1, i]).to(device),
                torch.from_numpy(state.prev[:1, i]).to(device),
                torch.from_numpy(state.tokens_written[:1, i]).to(device),
            )
            for i, layer in enumerate(self.layers)
        }

    def save(self, path: str | Path, identity: Identity | None = None) -> State:
        """Writes the memory-only file that llama-server reads (docs/state-format.md)."""
        return write_state(path, self.export_state(self.file_identity(identity)))

    def load(self, path: str | Path, identity: Identity | None = None) -> State:
        """Reads one that llama-server or `save` wrote, whose identity must be that of this adapter's sidecar."""
        state = read_state(path, identity=self.file_identity(identity), kinds=(MEMORY_KIND,))
        self.import_state(state)
        return state

    def load_bytes(self, data: bytes, identity: Identity | None = None) -> State:
        """The same with the bytes of a file."""
        with tempfile.NamedTemporaryFile(suffix=".memory") as file:
            file.write(data)
            file.flush()
            return self.load(file.name, identity)

    def file_identity(self, given: Identity | None = None) -> Identity:
        """What its memory files belong to. Raises LlamamemError if neither is given nor known."""
        identity = given or self.adapter.identity
        if identity is None:
            raise LlamamemError(
                "a memory file belongs to a sidecar, and a checkpoint directory has no identity; attach the sidecar"
                " that was exported from it (`llamamem sidecar export`)"
            )
        return identity

    # what the hooks do

    def _hook(self, layer: int, memory: Layer, attention: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self._deltas[layer] = self._run(layer, memory, h)

        self._hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        found = projections(attention)
        for head in memory.delta_heads:
            module, rows = found[head]

            def add(module: nn.Module, args: Any, out: Tensor, head: str = head, rows: slice = rows) -> Tensor:
                delta = self._deltas[layer][head].to(out.dtype)
                return out + F.pad(delta, (rows.start, out.shape[-1] - rows.stop))

            self._hooks.append(module.register_forward_hook(add))

    def _run(self, layer: int, memory: Layer, h: Tensor) -> dict[str, Tensor]:
        state = self._state.get(layer)
        if state is None:
            state = self._fresh(layer, len(h))
        elif len(state.n) != len(h):
            raise LlamamemError(f"the memory has {len(state.n)} sequences, the pass {len(h)}; reset it before")
        mask = torch.full(h.shape[:2], LIVE, device=h.device) if self._mask is None else self._mask.to(h.device)
        if mask.shape != h.shape[:2]:
            raise LlamamemError(f"the mask has shape {list(mask.shape)}, the pass {list(h.shape[:2])}")
        if self.frozen:
            mask = torch.where(mask == LIVE, FROZEN, mask)
        faults = {f.token - self.seen[layer]: f.kind for f in self.faults if f.layer == layer}
        deltas, state = _faulty(memory, h, state, mask, faults) if faults else memory(h, state, mask)
        self._state[layer] = state
        self.seen[layer] += h.shape[1]
        if self.norms is not None:
            if not self.norms or layer in self.norms[-1]:
                self.norms.append({})
            self.norms[-1][layer] = {x: torch.linalg.vector_norm(d.detach(), dim=-1) for x, d in deltas.items()}
        return {head: delta * self.scale for head, delta in deltas.items()}

    def _fresh(self, layer: int, batch: int) -> MemoryState:
        return self.adapter.layers[layer].fresh(batch)


def attach(model: nn.Module, adapter: Adapter | str | Path, config: str | None = None) -> Attached:
    """Attaches an adapter (or reads it: a checkpoint directory or a sidecar) and returns the handle of its memory.

    The base's weights are left as they are, also their `requires_grad`. Not for gradient checkpointing, which would
    run tokens twice through the memory. Raises LlamamemError if the adapter does not fit.
    """
    return Attached(model, adapter if isinstance(adapter, Adapter) else read_adapter(adapter, config))


def attention_layers(model: nn.Module) -> dict[int, Any]:
    """The self-attention modules of a model's text decoder by layer, whatever it is wrapped in."""
    whole: Any = model
    modules: Iterator[Any] = (whole.get_decoder() if hasattr(whole, "get_decoder") else whole).modules()
    found = {int(m.layer_idx): m for m in modules if _is_attention(m)}
    if not found:
        raise LlamamemError(
            f"{type(model).__name__} has no layers with a q_proj, or a qkv_proj, and an o_proj; a memory needs both"
        )
    return dict(sorted(found.items()))


def _is_attention(module: Any) -> bool:
    has_queries = hasattr(module, "q_proj") or hasattr(module, "qkv_proj")
    return has_queries and all(hasattr(module, name) for name in ("layer_idx", "o_proj"))


def projections(attention: Any) -> dict[str, tuple[nn.Linear, slice]]:
    """The projections that a layer has, by head, and which rows of the weight are the head's: q, k and v may be one.

    A layer that reuses keys and values has q and o only.
    """
    modules = {head: getattr(attention, f"{head}_proj", None) for head in ("q", "k", "v", "o")}
    found = {head: (module, slice(0, module.out_features)) for head, module in modules.items() if module is not None}
    if "q" not in found:  # as Phi-3 has them, one after the other
        qkv = attention.qkv_proj
        q = attention.config.num_attention_heads * attention.head_dim
        edges = {
            "q": (0, q),
            "k": (q, (q + qkv.out_features) // 2),
            "v": ((q + qkv.out_features) // 2, qkv.out_features),
        }
        found |= {head: (qkv, slice(*rows)) for head, rows in edges.items()}
    return found


def projection_widths(attention: nn.Module) -> dict[str, int]:
    """Output widths of the projections that a layer has, by head."""
    return {head: rows.stop - rows.start for head, (_, rows) in projections(attention).items()}


def hidden_width(attention: nn.Module) -> int:
    """The width of what enters a layer's attention."""
    return projections(attention)["q"][0].in_features


def _check_fits(layer: int, memory: Layer, attention: dict[int, Any]) -> None:
    if layer not in attention:
        raise LlamamemError(f"target layer {layer} is not one of the base's {len(attention)}; attach to another base")
    widths = projection_widths(attention[layer])
    hidden = hidden_width(attention[layer])
    if hidden != memory.shape.hidden:
        raise LlamamemError(
            f"layer {layer}: the adapter is for hidden size {memory.shape.hidden}, the base has {hidden}"
        )
    if getattr(attention[layer], "use_alternative_attention", False) and {"k", "v"} & set(memory.delta_heads):
        raise LlamamemError(f"layer {layer}: keys and values are one in this base; a delta of k or v would reach both")
    for head in memory.delta_heads:
        width = len(memory.get_parameter(f"delta_{head}_proj"))
        if widths.get(head) != width:
            raise LlamamemError(
                f"layer {layer}: delta_{head}_proj is {width} wide, the base's {head} {widths.get(head)}"
            )


def _faulty(
    memory: Layer, h: Tensor, state: MemoryState, mask: Tensor, faults: dict[int, str]
) -> tuple[dict[str, Tensor], MemoryState]:
    """Token by token, with what is to go wrong at some of them."""
    pieces = []
    for t in range(h.shape[1]):
        kind = faults.get(t)
        if kind == "lost-source":
            state = state._replace(prev=torch.zeros_like(state.prev))
        elif kind == "shift-counter":
            state = state._replace(n=state.n + 1)
        deltas, after = memory(h[:, t : t + 1], state, mask[:, t : t + 1])
        state = after._replace(S=state.S) if kind == "skip-write" else after
        pieces.append(deltas)
    return {head: torch.cat([piece[head] for piece in pieces], dim=1) for head in pieces[0]}, state
