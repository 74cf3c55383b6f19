"""Steps of torch's optimizers as pure functions that can be differentiated in everything, their settings included.

A step takes one parameter, its gradient and its state, under the names that ``torch.optim`` uses in
``optimizer.state[parameter]``, and returns a new parameter and a new state. Nothing is changed in place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_hpo.functional.bilevel.problem import Tensors

__all__ = [
    "FunctionalOptimizer",
    "Number",
    "State",
    "Step",
    "adam",
    "adamw",
    "functional_optimizer",
    "sgd",
    "step_all",
    "step_of",
    "step_settings",
]

Number = float | Tensor
State = dict[str, Tensor]
Step = Callable[..., tuple[Tensor, State]]
# (params, grads, states, hparams) -> (params, states), dicts by the names of the parameters
FunctionalOptimizer = Callable[[Tensors, Tensors, dict[str, State], Tensors], tuple[Tensors, dict[str, State]]]


def sgd(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: Number,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, State]:
    r"""One step of ``torch.optim.SGD``.

    .. math::

        \tilde g = g + \lambda w, \qquad b' = \mu b + (1 - \tau) \tilde g, \qquad w' = w - \eta b'

    with :math:`b' = \tilde g` in the first step, and :math:`w' = w - \eta (\tilde g + \mu b')` if ``nesterov``.

    Args:
        param: The parameter :math:`w`.
        grad: Its gradient :math:`g`, of the same shape.
        state: Empty, or the buffer :math:`b` under ``"momentum_buffer"``.
        lr: Learning rate :math:`\eta`; this and the numbers that follow may be scalar tensors.
        momentum: The factor :math:`\mu`. A tensor always keeps a buffer, also where its value is 0.
        dampening: The :math:`\tau`.
        weight_decay: The :math:`\lambda`.
        nesterov: Whether to use Nesterov's momentum.
        maximize: Whether to go up.

    Returns:
        The new parameter and the new state.

    Example:
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> new, _ = sgd(torch.tensor(1.0), torch.tensor(4.0), {}, lr=lr)
        >>> new, *torch.autograd.grad(new, lr)
        (tensor(0.6000, grad_fn=<SubBackward0>), tensor(-4.))
    """
    grad = -grad if maximize else grad
    grad = grad + weight_decay * param if _used(weight_decay) else grad
    if not _used(momentum):
        return param - lr * grad, {}
    buffer = state.get("momentum_buffer")
    buffer = grad if buffer is None else momentum * buffer + (1 - dampening) * grad
    return param - lr * (grad + momentum * buffer if nesterov else buffer), {"momentum_buffer": buffer}


def adam(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    *,
    lr: Number = 1e-3,
    beta1: Number = 0.9,
    beta2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    r"""One step of ``torch.optim.Adam``.

    .. math::

        m' = \beta_1 m + (1 - \beta_1) g, \qquad v' = \beta_2 v + (1 - \beta_2) g^2, \qquad
        w' = w - \frac{\eta}{1 - \beta_1^t} \frac{m'}{\sqrt{v' / (1 - \beta_2^t)} + \epsilon}

    Weight decay adds :math:`\lambda w` to :math:`g`, or, decoupled, first scales :math:`w` by :math:`1 - \eta\lambda`.
    Where :math:`v' = 0` the slope of its root counts as 0, so that no derivative is NaN.

    Args:
        param: The parameter :math:`w`.
        grad: Its gradient :math:`g`, of the same shape.
        state: Empty, or ``"step"``, ``"exp_avg"``, ``"exp_avg_sq"`` and with ``amsgrad`` ``"max_exp_avg_sq"``.
        lr: Learning rate :math:`\eta`; this and the numbers that follow may be scalar tensors.
        beta1: Memory of the mean.
        beta2: Memory of the square.
        eps: The :math:`\epsilon`.
        weight_decay: The :math:`\lambda`.
        amsgrad: Whether to divide by the largest :math:`v` so far.
        maximize: Whether to go up.
        decoupled_weight_decay: Whether weight decay acts on the parameter alone, as in AdamW.

    Returns:
        The new parameter and the new state.

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1. Loshchilov and Hutter,
        "Decoupled Weight Decay Regularization", 2019, algorithm 2.

    Example:
        >>> new, state = adam(torch.tensor(1.0), torch.tensor(4.0), {}, lr=0.1)
        >>> new, state["exp_avg"]  # the first step has the length of the learning rate
        (tensor(0.9000), tensor(0.4000))
    """
    grad = -grad if maximize else grad
    if _used(weight_decay) and decoupled_weight_decay:
        param = param * (1 - lr * weight_decay)
    elif _used(weight_decay):
        grad = grad + weight_decay * param
    step = state["step"].detach() + 1 if "step" in state else torch.ones((), dtype=torch.float32)
    zero = torch.zeros_like(grad)
    mean = beta1 * state.get("exp_avg", zero) + (1 - beta1) * grad
    square = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * grad * grad
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    if amsgrad:
        square = new["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zero), square)
    count = step.double()  # beta ** step in float32 would be off in the eighth digit
    root = _safe_sqrt(square) / (1 - beta2**count).sqrt()
    stepped = param - lr / (1 - beta1**count) * (mean / (root + eps))
    return stepped.to(param.dtype), new  # a parameter without dimensions would become double here


def adamw(
    param: Tensor, grad: Tensor, state: Mapping[str, Tensor], *, weight_decay: Number = 1e-2, **settings: Any
) -> tuple[Tensor, State]:
    """One step of ``torch.optim.AdamW``: :func:`adam` with decoupled weight decay.

    Args:
        param: The parameter.
        grad: Its gradient.
        state: As for :func:`adam`.
        weight_decay: The decay.
        settings: The other settings of :func:`adam`.

    Returns:
        The new parameter and the new state.

    Example:
        >>> new, _ = adamw(torch.tensor(1.0), torch.tensor(0.0), {}, lr=0.1, weight_decay=0.5)
        >>> new
        tensor(0.9500)
    """
    return adam(param, grad, state, weight_decay=weight_decay, **(settings | {"decoupled_weight_decay": True}))


def step_all(
    step: Step, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], states: Mapping[str, State], **settings: Any
) -> tuple[Tensors, dict[str, State]]:
    """One step of every parameter.

    Args:
        step: One of the steps above.
        params: Parameters by name.
        grads: Their gradients.
        states: Their states; what is missing begins empty.
        settings: Settings of the step, the same for all.

    Returns:
        New parameters and new states by name.

    Example:
        >>> step_all(sgd, {"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}, {}, lr=0.25)
        ({'w': tensor(0.)}, {'w': {}})
    """
    stepped = {name: step(param, grads[name], states.get(name, {}), **settings) for name, param in params.items()}
    return {name: new for name, (new, _) in stepped.items()}, {name: state for name, (_, state) in stepped.items()}


def functional_optimizer(step: Step, **settings: Number | bool | str) -> FunctionalOptimizer:
    """An optimizer for unrolled training, whose settings may be hyperparameters.

    Args:
        step: One of the steps above.
        settings: Its settings; a string is the name of the hyperparameter that has the value.

    Returns:
        A function ``(params, grads, states, hparams)`` to new parameters and states.

    Example:
        >>> optimizer = functional_optimizer(sgd, lr="rate")
        >>> optimizer({"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}, {}, {"rate": torch.tensor(0.25)})
        ({'w': tensor(0.)}, {'w': {}})
    """

    def apply(
        params: Tensors, grads: Tensors, states: dict[str, State], hparams: Tensors
    ) -> tuple[Tensors, dict[str, State]]:
        values = {key: hparams[value] if isinstance(value, str) else value for key, value in settings.items()}
        return step_all(step, params, grads, states, **values)

    return apply


def step_of(optimizer: Optimizer) -> Step:
    """The step that an optimizer of torch takes.

    Args:
        optimizer: An SGD, Adam or AdamW.

    Returns:
        The pure function; :func:`step_settings` has its settings.

    Raises:
        ValueError: If the optimizer is of another class, a subclass included, since its step may differ.

    Example:
        >>> step_of(torch.optim.SGD([torch.zeros(1)], lr=0.1)).__name__
        'sgd'
    """
    known: dict[type, Step] = {torch.optim.SGD: sgd, torch.optim.Adam: adam, torch.optim.AdamW: adamw}
    if type(optimizer) not in known:
        names = ", ".join(kind.__name__ for kind in known)
        raise ValueError(f"the step of `{type(optimizer).__name__}` is not known here; it must be one of {names}")
    return known[type(optimizer)]


def step_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a step from a group of an optimizer's ``param_groups``.

    Args:
        group: A group of SGD, Adam or AdamW.

    Returns:
        Keyword arguments for the step; ``betas`` are split into ``beta1`` and ``beta2``.

    Example:
        >>> step_settings(torch.optim.SGD([torch.zeros(1)], lr=0.1).param_groups[0])["lr"]
        0.1
    """
    named = dict(group)
    if "betas" in named:
        named["beta1"], named["beta2"] = named.pop("betas")
    used = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"}
    used |= {"beta1", "beta2", "eps", "amsgrad", "decoupled_weight_decay"}
    return {key: value for key, value in named.items() if key in used}


def _used(setting: Number) -> bool:
    # A tensor is always used: to look at its value would stop the device, and its slope is wanted also at 0.
    return isinstance(setting, Tensor) or setting != 0


def _safe_sqrt(square: Tensor) -> Tensor:
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
