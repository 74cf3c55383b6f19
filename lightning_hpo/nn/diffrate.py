"""Token compression of timm networks: apply a schedule, undo it, count its multiply-accumulates."""

from collections.abc import Callable
from typing import Literal, TypeVar

from torch import Tensor, nn

from lightning_hpo.functional.compression.counts import halved_at_most, segments
from lightning_hpo.functional.compression.schedule import TokenCompressionSchedule
from lightning_hpo.nn.timm_blocks import COMPRESSED_BLOCKS, COMPRESSED_MODELS, ORIGINALS
from lightning_hpo.nn.timm_models import Anatomy, describe
from lightning_hpo.nn.token_state import BlockCompression, CompressionRules, TokenState

__all__ = [
    "apply_token_compression",
    "attach",
    "remove_token_compression",
    "set_schedule",
    "token_groups",
    "vit_macs",
]

Importance = Literal["class", "mean"]
Matching = Literal["features", "keys", "bipartite"]
SizeRule = Literal["clamped", "unclamped"]
Model = TypeVar("Model", bound=nn.Module)


def vit_macs(model: nn.Module, schedule: TokenCompressionSchedule | None = None, image_size: int | None = None) -> int:
    r"""Multiply-accumulates of one image, with the tokens that ``schedule`` keeps.

    Counted are the linear layers of stem, blocks and head and the two attention products, as in the paper: norms,
    activations, softmax, sorting, matching and attention pooling are not.

    Args:
        model: A timm network; see :func:`apply_token_compression`.
        schedule: Kept tokens; None counts the uncompressed network.
        image_size: Height and width of the images, for CAFormer.

    Returns:
        The count.

    Raises:
        TypeError, NotImplementedError, ValueError: As :func:`apply_token_compression`.

    References:
        Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023, sec. 3.3.

    Example:
        >>> import timm
        >>> vit_macs(timm.create_model("deit_small_patch16_224"))
        4599177216
    """
    cost = describe(model, image_size).layout.cost
    return cost.full if schedule is None else cost.count(schedule.prune, schedule.merge)


def apply_token_compression(
    model: Model,
    schedule: TokenCompressionSchedule,
    importance: Importance | None = None,
    matching: Matching | None = None,
    size_rule: SizeRule | None = None,
    trace: bool = False,
) -> Model:
    r"""Makes a timm network drop and merge tokens as ``schedule`` says; its sequences become really shorter.

    Between attention and MLP each block keeps the patches of highest importance, then merges the least important of
    them into their nearest neighbours by cosine similarity; attention weighs a merged token by the logarithm of its
    size. Works in place. Parameters keep their names and values, so checkpoints fit both ways; training the compressed
    network, ``torch.compile`` and ``torch.export`` work as before. :func:`remove_token_compression` undoes it.

    Args:
        model: A timm ``VisionTransformer`` (ViT, DeiT, DeiT-III, DINOv2, MAE, SigLIP ...), ``Eva`` (EVA-02, DINOv3 ...)
            or CAFormer (merging only).
        schedule: Kept tokens of each block.
        importance: ``"class"``: attention that the class token pays; ``"mean"``: mean attention received. By default
            that of the schedule, else the first where there is a class token.
        matching: ``"features"`` compares tokens after attention, ``"keys"`` their attention keys; ``"bipartite"``
            merges alternating pairs of similar keys as ToMe does. By default that of the schedule, else the first.
        size_rule: ``"clamped"`` lets a merged token count for at least one; ``"unclamped"`` is the official inference
            rule, under which an unlike source shrinks its destination. By default that of the schedule, else the first.
        trace: Whether to record the group of each patch for :func:`token_groups`.

    Returns:
        ``model``.

    Raises:
        TypeError: If there is no supported transformer block.
        NotImplementedError: If a block or the pooling cannot be compressed; says which and why.
        RuntimeError: If compression is applied already, or ``model`` is wrapped for distributed training.
        ValueError: If the schedule was made for another network, ``importance`` needs a class token, or the schedule
            prunes or merges more than half of the patches in a block where they merge in pairs.

    References:
        Chen et al., "DiffRate", ICCV 2023, sec. 3.2; Bolya et al., "Token Merging", ICLR 2023.

    Example:
        >>> import timm, torch
        >>> from lightning_hpo import PUBLISHED_SCHEDULES
        >>> model = timm.create_model("deit_tiny_patch16_224").eval()
        >>> model = apply_token_compression(model, PUBLISHED_SCHEDULES["vit_tiny_deit"]["0.6"])
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    anatomy = describe(model, _image_size(model, schedule))
    schedule.validate(entry=anatomy.layout.cost.entry, prefix=anatomy.layout.prefix)
    if anatomy.whole_grid and any(kept < before for before, kept, _ in schedule.running()):
        raise ValueError(f"`{type(model).__name__}` needs its whole grid back: it can merge tokens but not prune them.")
    matching = matching or schedule.matching or "features"
    if matching == "bipartite":
        _refuse_more_than_pairs(schedule)
    rules = (importance or schedule.importance, matching, size_rule or schedule.size_rule or "clamped")
    attach(anatomy, *rules, trace=trace)
    set_schedule(anatomy, schedule)
    return model


def remove_token_compression(model: Model) -> Model:
    """Undoes :func:`apply_token_compression` exactly; the trained parameters stay.

    Args:
        model: A network, compressed or not.

    Returns:
        ``model``, of its original classes.

    Example:
        >>> import timm
        >>> from lightning_hpo import PUBLISHED_SCHEDULES
        >>> model = timm.create_model("deit_tiny_patch16_224")
        >>> _ = apply_token_compression(model, PUBLISHED_SCHEDULES["vit_tiny_deit"]["0.6"])
        >>> type(remove_token_compression(model)).__name__, type(model.blocks[1]).__name__
        ('VisionTransformer', 'Block')
    """
    for module in model.modules():
        module.__dict__.pop("token_compression", None)
        module.__class__ = ORIGINALS.get(type(module), type(module))
    return model


def token_groups(model: nn.Module) -> Tensor:
    """Which token each patch of the latest images ended in.

    Args:
        model: A network compressed with ``trace=True``, after a forward pass in eval mode.

    Returns:
        Index of the token among those left, -1 for pruned patches, shape ``(batch, patches)``.

    Raises:
        ValueError: If nothing was traced.

    Example:
        >>> import timm, torch
        >>> from lightning_hpo import PUBLISHED_SCHEDULES
        >>> schedule = PUBLISHED_SCHEDULES["vit_tiny_deit"]["0.6"]
        >>> model = apply_token_compression(timm.create_model("deit_tiny_patch16_224").eval(), schedule, trace=True)
        >>> _ = model(torch.randn(1, 3, 224, 224))
        >>> token_groups(model).shape
        torch.Size([1, 196])
    """
    for module in model.modules():
        slot = module.__dict__.get("token_compression")
        if isinstance(slot, BlockCompression) and slot.state.group is not None:
            return slot.state.group
    raise ValueError("Nothing was traced: apply the schedule with `trace=True` and run the network once.")


def attach(
    anatomy: Anatomy,
    importance: Importance | None = None,
    matching: Matching = "features",
    size_rule: SizeRule = "clamped",
    trace: bool = False,
    granularity: int = 1,
    probabilities: Callable[[], Tensor] | None = None,
) -> TokenState:
    """Gives every block of a network its compressed class; nothing is dropped until a schedule is set.

    Args:
        anatomy: The network, looked over by :func:`~lightning_hpo.nn.timm_models.describe`.
        importance: See :func:`apply_token_compression`.
        matching: See :func:`apply_token_compression`.
        size_rule: See :func:`apply_token_compression`.
        trace: See :func:`apply_token_compression`.
        granularity: Step of the candidate counts while rates are learned.
        probabilities: Returns the probabilities of the candidates, ``(kinds, blocks, candidates)``, to learn rates.

    Returns:
        What the blocks share.

    Raises:
        ValueError: If ``importance`` or ``matching`` does not fit.
    """
    for name, value, allowed in (
        ("importance", importance, (None, "class", "mean")),
        ("matching", matching, ("features", "keys", "bipartite")),
        ("size_rule", size_rule, ("clamped", "unclamped")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
    if importance == "class" and not anatomy.has_class_token:
        raise ValueError(
            f"`{type(anatomy.model).__name__}` here has no class token to rank patches by; use `importance='mean'`."
        )
    rules = CompressionRules(importance or anatomy.importance, matching, size_rule == "clamped")
    layout, entry = anatomy.layout, anatomy.layout.cost.entry
    state = TokenState(layout.prefix, rules, trace or anatomy.whole_grid, granularity, probabilities)
    opening = {start: not all(layout.exempt[start:stop]) for start, stop in segments(entry)}
    closing = {stop - 1 for _, stop in segments(entry)} if anatomy.whole_grid else set()
    rows = {index: row for row, index in enumerate(layout.blocks)}
    rows.pop(len(entry) - 1, None)  # exempt where the head reads patches; elsewhere nobody sees what it does to them
    for index, block in enumerate(anatomy.blocks):
        slot = BlockCompression(state, entry[index], entry[index], entry[index], rows.get(index))
        slot.opens, slot.learns, slot.restores = index in opening, opening.get(index, False), index in closing
        block.token_compression = slot  # type: ignore[assignment]
        block.__class__ = COMPRESSED_BLOCKS[type(block)]
    if type(anatomy.model) in COMPRESSED_MODELS:
        anatomy.model.token_compression = state  # type: ignore[assignment]
        anatomy.model.__class__ = COMPRESSED_MODELS[type(anatomy.model)]
    return state


def set_schedule(anatomy: Anatomy, schedule: TokenCompressionSchedule) -> None:
    """Makes an attached network keep what ``schedule`` says."""
    for block, (_, prune, merge) in zip(anatomy.blocks, schedule.running(), strict=True):
        block.token_compression.prune, block.token_compression.merge = prune, merge  # type: ignore[union-attr]


def _refuse_more_than_pairs(schedule: TokenCompressionSchedule) -> None:
    running = schedule.running()
    pruning = [block for block, (before, kept, _) in enumerate(running) if kept < before]
    pairs = halved_at_most([left for *_, left in running], schedule.entry, schedule.prefix)
    beyond = [block for block, ((*_, left), least) in enumerate(zip(running, pairs, strict=True)) if left < least]
    problems = [f"blocks {pruning} prune"] if pruning else []
    problems += [f"blocks {beyond} give up more than half of their patches"] if beyond else []
    if problems:
        raise ValueError(
            f"matching='bipartite' merges patches in pairs, but {' and '.join(problems)} (counted from 0)."
        )


def _image_size(model: nn.Module, schedule: TokenCompressionSchedule) -> int | None:
    """Image size that a hierarchical network's schedule was made for."""
    return None if hasattr(model, "patch_embed") else round(schedule.entry[0] ** 0.5) * 16
