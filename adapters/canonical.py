"""Convolutional networks in the canonical form that the rules of relevance propagation are made for."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from zennit import types
from zennit.layer import Sum

_FOREIGN = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.MultiheadAttention)
_MODULES = (
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d),
)
_AVERAGES = ("mean", "avg_pool2d", "adaptive_avg_pool2d")
_MOVES = (  # each value goes somewhere, or nowhere, and so does its relevance, along the gradient
    *("flatten", "view", "reshape", "squeeze", "unsqueeze", "expand", "expand_as", "permute", "transpose"),
    *("contiguous", "getitem", "chunk", "split", "pad", "dropout", "max_pool2d", "adaptive_max_pool2d", "output"),
)
_OUT_OF_PLACE = {operator.iadd: operator.add, operator.imul: operator.mul}


class NoRuleError(ValueError):
    """The model computes something for which there is no rule; the message is a clause that says what."""


def canonical(model: nn.Module) -> fx.GraphModule:
    """Return a copy of `model` that computes the same, each step a module with a rule or one that moves values.

    BatchNorm is merged into the convolution or linear layer before it. Shortcuts are added by zennit's `Sum`,
    functional averages taken by `Average`. In a product with the output of a sigmoid all gradient goes to the other
    factor. No step works in place, each has a module of its own, and what is unchanged shares the model's weights.

    Raises
    ------
    NoRuleError
        Where there is no such copy.
    """
    for module in model.modules():
        if isinstance(module, _FOREIGN):
            raise NoRuleError(f"it has {type(module).__name__}, for which there is no rule")
    root = _twin(model).eval()
    try:
        graph = _Tracer().trace(root)
    except Exception as error:
        raise NoRuleError("torch.fx cannot follow its forward: " + str(error).partition("\n")[0]) from error
    _work_out_of_place(root, graph)
    _Canonizer(root, graph).run()
    return fx.GraphModule(root, graph)


class Average(nn.Module):
    """The average that a step of a graph takes by a function or method, as a module."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.target, self.args, self.kwargs = node.target, node.args[1:], dict(node.kwargs)
        if len(node.all_input_nodes) > 1:
            raise NoRuleError(f"it takes {_operation(node)} over a size that depends on the input")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the average."""
        function = getattr(Tensor, self.target) if isinstance(self.target, str) else self.target
        return function(inputs, *self.args, **self.kwargs)  # type: ignore[operator]


class _Tracer(fx.Tracer):
    """Follows a model down to PyTorch's layers; timm's BatchNorm with an activation becomes two of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = _has_rule(m) or isinstance(m, BatchNormAct2d)
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        return m.act(m.drop(output)) if isinstance(m, BatchNormAct2d) else output


def _work_out_of_place(root: nn.Module, graph: fx.Graph) -> None:
    """Let every step return a new tensor, which is read by all that would later have read the overwritten one."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _works_in_place(root, node):
            node.args[0].replace_all_uses_with(node, lambda user, here=order[node]: order[user] > here)
            if node.op == "call_method":
                node.target = node.target.rstrip("_")
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    for module in root.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]


def _works_in_place(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    method = node.op == "call_method" and str(node.target).endswith("_")
    return method or node.target in _OUT_OF_PLACE or node.kwargs.get("inplace") is True


class _Canonizer:
    """Walks from the logits back to the image and gives every step that passes relevance on its canonical form."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.done: set[fx.Node] = set()

    def run(self) -> None:
        waiting = [node for node in self.graph.nodes if node.op == "output"]
        while waiting:
            node = waiting.pop()
            if node not in self.done:
                self.done.add(node)
                waiting += self.step(node)

    def step(self, node: fx.Node) -> list[fx.Node]:
        """Rewrite a step and return those whose outputs get its relevance."""
        if node.op == "placeholder":
            return []
        name = _operation(node)
        special = {"module": self.module, "add": self.sum, "mul": self.gate}
        if name in special:
            return special[name](node)
        if name in ("cat", "concat"):
            return _tensors(name, _first(node))
        if name not in (*_MOVES, *_AVERAGES, "relu"):
            raise NoRuleError(f"it uses {name}, for which there is no rule")
        sources = _tensors(name, [_first(node)])
        if name in _AVERAGES or name == "relu":
            self.put(node, nn.ReLU() if name == "relu" else Average(node), sources[0])
        return sources

    def module(self, node: fx.Node) -> list[fx.Node]:
        module = self.root.get_submodule(str(node.target))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise NoRuleError("its BatchNorm has no running statistics, so that images change each other's logits")
        if isinstance(module, BatchNormAct2d):
            module = _without_activation(module)
        if not _has_rule(module):
            raise NoRuleError(f"it has {type(module).__name__}, for which there is no rule")
        (source,) = sources = _tensors(str(node.target), [_first(node)])
        fused = self.fused(source, module) if isinstance(module, types.BatchNorm) else None
        if fused:
            sources = _tensors(str(source.target), [_first(source)])
        self.put(node, fused or _twin(module), sources[0])
        if fused:
            self.graph.erase_node(source)
        return sources

    def fused(self, source: fx.Node, norm: Any) -> nn.Module | None:
        """Return the layer before a BatchNorm with it merged in, or None where there is none or others read it."""
        if source.op != "call_module" or len(source.users) > 1:
            return None
        layer = self.root.get_submodule(str(source.target))
        if not _has_rule(layer) or not isinstance(layer, types.Linear):
            return None
        return (fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval)(layer, norm)

    def sum(self, node: fx.Node) -> list[fx.Node]:
        terms = _tensors("sum", [*node.args, *node.kwargs.values()])
        with self.graph.inserting_before(node):
            self.put(node, Sum(), self.graph.call_function(_stack, tuple(terms)))
        return terms

    def gate(self, node: fx.Node) -> list[fx.Node]:
        factors = _tensors("product", [*node.args, *node.kwargs.values()])
        signals = [factor for factor in factors if not self.is_gate(factor)]
        if len(factors) != 2 or len(signals) != 1:
            raise NoRuleError("it has a product of tensors of which not exactly one is a gate, the output of a sigmoid")
        (gate,) = set(factors) - set(signals)
        with self.graph.inserting_before(node):
            self.replace(node, self.graph.call_function(_gated, (signals[0], gate)))
        return signals

    def is_gate(self, node: fx.Node) -> bool:
        while _operation(node) in _MOVES and isinstance(_first(node), fx.Node):
            node = _first(node)
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), (nn.Sigmoid, nn.Hardsigmoid))
        return _operation(node) in ("sigmoid", "hardsigmoid")

    def put(self, node: fx.Node, module: nn.Module, source: fx.Node) -> None:
        """Put a module of its own in a step's place: a rule keeps in it what it saw, in one call."""
        name = f"canonical_{node.name}"
        self.root.add_module(name, module)
        with self.graph.inserting_before(node):
            self.replace(node, self.graph.call_module(name, (source,)))

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)
        self.done.add(by)


def _twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def _has_rule(module: nn.Module) -> bool:
    return any(type(module).forward is kind.forward for kind in _MODULES)


def _without_activation(module: BatchNormAct2d) -> nn.Module:
    norm = nn.BatchNorm2d(module.num_features, module.eps).to(module.running_mean)
    norm.load_state_dict(module.state_dict(), strict=False)
    return norm.eval()


def _operation(node: fx.Node) -> str:
    if node.op in ("call_function", "call_method"):
        return node.target if isinstance(node.target, str) else node.target.__name__
    return {"call_module": "module", "get_attr": "a constant"}.get(node.op, node.op)


def _first(node: fx.Node) -> Any:
    return next(iter((*node.args, *node.kwargs.values())), None)


def _tensors(name: str, values: Iterable[Any]) -> list[fx.Node]:
    values = list(values)
    if not all(isinstance(value, fx.Node) for value in values):
        raise NoRuleError(f"its {name} is not of tensors alone")
    return values


def _stack(*terms: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*terms), -1)


def _gated(signal: Tensor, gate: Tensor) -> Tensor:
    return _SignalTakesAll.apply(signal, gate.detach())


class _SignalTakesAll(torch.autograd.Function):
    """A product all of whose gradient, which is relevance here, goes to the first factor as it is."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, gate: Tensor) -> Tensor:
        ctx.shape = signal.shape
        return signal * gate

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None]:
        return relevance[0].sum_to_size(ctx.shape), None
