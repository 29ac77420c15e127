"""Memory of one GPU, by part and by the phase of an update in which it is held.

With ``F`` frozen and ``P`` trained parameters, as ``regrpo.packed_model`` keeps them::

    frozen weights      F times 2 bytes (bfloat16 under an adapter) or 4
    trained weights     4 P
    optimizer           8 P    AdamW's two moments in float32 (Loshchilov and Hutter 2019,
                               arXiv 1711.05101)
    reference           4 P    if there is a KL: the trained weights at the start. The base under an
                               adapter is not copied.
    gradients           4 P    from the first backward pass to the optimizer's step
    bfloat16 copies     2 bytes of every trained matrix, which autocast and the head make

With FSDP (Zhao et al. 2023, arXiv 2304.11277) these are divided by the number of processes; whole
at a time are embedding, head and two layers while learning, and everything while sampling.

Left out: the CUDA context and NCCL's buffers, fragmentation, what a library's kernels need for
themselves, and the options that add passes (replays, demonstrations, refinements, own states).
"""

from dataclasses import dataclass

from torch import nn

from regrpo.config import PlanConfig, SFTConfig
from regrpo.decoding import ROOM
from regrpo.modeling import decoder, head
from regrpo.plan.activations import (
    image_bytes,
    in_flight,
    kept_activations,
    key_value_bytes,
    last_activations,
    layer_activations,
    prefill_bytes,
)
from regrpo.plan.model import (
    CausalLM,
    Precision,
    RunConfig,
    adapted,
    linear_numel,
    linears,
    numel,
    precision,
    vision_tower,
)
from regrpo.plan.work import Work
from regrpo_kernels.linear_head import CHUNK_BYTES

ALWAYS, SAMPLING, LEARNING = "always", "sampling", "learning"
PREFILL, DECODING = "prefill", "decoding"  # one after another while sampling
FORWARD, LOSS, BACKWARD = "forward", "loss", "backward"  # one after another while learning
COPIES = "bfloat16 copies of trained weights"
MAX_BATCH = 512  # trajectories that ``regrpo.sampling`` decodes together


@dataclass(frozen=True)
class Part:
    """Bytes of a GPU that something takes, in a phase of an update or always.

    Sampling and learning alternate; prefill and decoding while sampling; forward, loss and backward
    of a pass while learning.
    """

    name: str
    phase: str
    bytes: float


def memory(run: RunConfig, model: CausalLM, work: Work, plan: PlanConfig) -> list[Part]:
    """The parts of one GPU's memory that are not empty."""
    kinds = precision(run, model)
    shards = plan.processes if run.parallel == "fsdp" else 1
    trained = numel(model, trained=True)
    tower = vision_tower(model)
    seen = numel(tower, trained=False) if tower is not None else 0
    frozen = numel(model, trained=False) - seen
    copies = cast_copies(model, kinds)
    parts = [
        Part("weights, frozen", ALWAYS, kinds.frozen * frozen / shards),
        Part("weights of the vision tower, frozen", ALWAYS, kinds.frozen * seen / shards),
        Part("weights, trained", ALWAYS, 4 * trained / shards),
        Part("AdamW moments", ALWAYS, 8 * trained / shards),
        Part("reference", ALWAYS, 4 * trained * work.reference / shards),
        Part("gradients", LEARNING, 4 * trained / shards),
    ]
    if shards > 1:
        copies = 0  # gathered in the dtype of the computation
        parts.append(Part("weights gathered by FSDP", LEARNING, gathered(model, kinds)))
    tokens, again = work.pass_tokens, run.gradient_checkpointing
    rows = round(tokens * work.trained_share)
    layer = layer_activations(model, kinds) * again
    parts += [
        Part(COPIES, FORWARD if again else LEARNING, copies),
        Part("activations", LEARNING, tokens * kept_activations(model, kinds, recomputed=again)),
        Part("activations of a layer, again", BACKWARD, tokens * layer),
        Part("gradients of activations", BACKWARD, tokens * in_flight(model, kinds)),
        Part("last norm, hidden states", LOSS, tokens * last_activations(model, kinds)),
        Part("loss head", LOSS, head_bytes(model, kinds, rows)),
    ]
    if work.images:
        images = max(1.0, tokens / work.tokens * work.groups) * work.images
        held = image_bytes(model, kinds, work.image_tokens)
        parts.append(Part("vision tower", LEARNING, images * held))
    if work.samples:
        assert not isinstance(run, SFTConfig)
        contexts, branches = cache_bytes(model, kinds, work, run.rollout.cache_gib)
        batch = min(work.trajectories, MAX_BATCH)
        read = batch / work.size * work.context
        parts += [
            Part(COPIES, SAMPLING, copies),
            Part("keys and values of contexts", SAMPLING, contexts),
            Part("keys and values of trajectories", DECODING, branches),
            Part("contexts in one layer", PREFILL, read * prefill_bytes(model, kinds)),
            Part("logits", DECODING, batch * len(head(model)[0]) * (kinds.compute + 12)),
        ]
        if shards > 1:
            whole = kinds.compute * numel(model)
            parts.append(Part("weights gathered by FSDP", SAMPLING, whole))
        elif adapted(model) and kinds.frozen == 4:
            parts.append(Part("adapter merged into copies", SAMPLING, merged_bytes(model)))
    return [part for part in parts if part.bytes > 0]


def peak(parts: list[Part]) -> float:
    """The most that is held at a time."""

    def of(phase: str) -> float:
        return sum(part.bytes for part in parts if part.phase == phase)

    sampling = of(SAMPLING) + max(of(PREFILL), of(DECODING))
    learning = of(LEARNING) + max(of(FORWARD), of(LOSS), of(BACKWARD))
    return of(ALWAYS) + max(sampling, learning)


def cast_copies(model: CausalLM, kinds: Precision) -> int:
    """What autocast keeps: each trained matrix once more, in the dtype of the computation."""
    if kinds.compute == 4:
        return 0
    weight = head(model)[0]
    count = linear_numel(decoder(model), trained=True) + weight.requires_grad * weight.numel()
    return kinds.compute * count


def head_bytes(model: CausalLM, kinds: Precision, rows: int, chunk_bytes: int | None = None) -> int:
    """What ``linear_grpo_loss`` holds for so many trained rows: a chunk of logits, the rows and
    their gradients, and the gradient of a trained head, summed in float32 over several chunks.

    Args:
        chunk_bytes: of the logits, at most; None for those of a GPU.
    """
    weight = head(model)[0]
    if chunk_bytes is None:
        chunk_bytes = max(CHUNK_BYTES["cuda"], 4 * weight.numel() * weight.requires_grad)
    row = len(weight) * kinds.compute
    chunk = min(max(chunk_bytes // row, 1), rows)
    total = chunk * row + 4 * rows * weight.shape[1] * kinds.compute
    if weight.requires_grad:
        total += kinds.compute * weight.numel()
        if rows > chunk and kinds.compute < 4:
            total += 4 * weight.numel()
    return total


def branch_room(tokens: int) -> int:
    """Columns that ``regrpo.decoding`` keeps for so many new tokens: buffers that double."""
    room = 0
    while room < tokens:
        room = max(2 * room, room + 1 + ROOM)
    return room


def cache_bytes(
    model: CausalLM, kinds: Precision, work: Work, cache_gib: float
) -> tuple[float, float]:
    """Keys and values of contexts, and of what trajectories add to them, at their peak.

    A batch has its contexts once and a branch for each trajectory; larger buffers are there before
    the former ones are freed. Other batches wait with theirs, as far as ``cache_gib`` goes.
    """
    token, room = key_value_bytes(model, kinds), branch_room(work.branch)
    group = token * (work.context + work.size * room)
    batch = min(work.trajectories, MAX_BATCH) / work.size
    waiting = min(work.groups - batch, cache_gib * 2**30 / group)
    contexts = token * work.context * (batch + waiting)
    return contexts, token * work.size * room * (1.5 * batch + waiting)


def gathered(model: CausalLM, kinds: Precision) -> int:
    """Whole weights while FSDP learns: what is in no layer, two layers, and one layer's gradient in
    the dtype of the computation and in float32."""
    layers = [*decoder(model).layers, *getattr(vision_tower(model), "blocks", [])]
    rest = numel(model) - sum(numel(layer) for layer in layers)
    widest = max(layers, key=numel)
    gradient = (kinds.compute + 4) * numel(widest, trained=True)
    return kinds.compute * (rest + 2 * numel(widest)) + gradient


def merged_bytes(model: nn.Module) -> int:
    """Copies of the adapted projections, into which the sampler adds the adapter (float32)."""
    return 4 * sum(m.weight.numel() for n, m in linears(model) if n.endswith(".base_layer"))
