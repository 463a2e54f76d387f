"""Forward hooks that take the moments of the inputs behind each gradient.

Rows count once the gradient that they made is accumulated: passes that are never backpropagated, passes without
grad or in eval mode, and the second forward of activation checkpointing leave nothing behind. Those of a compiled
pass, whose outputs cannot be hooked, count with the next gradient, even if it was never backpropagated. No
activation is kept, only its moments.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gradcond.hooks import Hook, drop_inert
from gradcond.inputs import Deferred, Observer
from gradcond.layers import Layer, first_input
from gradcond.shards import is_sharded, local
from gradcond.statistics import Moments

__all__ = ["InputCapture"]

dist = torch.distributed
# before torch had the first, torch.export alone set the second
_EXPORTING = "_is_exporting_flag" if hasattr(torch.compiler, "_is_exporting_flag") else "_is_compiling_flag"


def _nothing() -> None:
    """In place of a weak reference."""


class InputCapture(Hook):
    """Collects the input moments of one layer's calls between two steps.

    A call is reached when a backward pass computes the gradient of its output, or goes through what an earlier one
    computed of it (of a penalty on derivatives), and counts when that pass accumulates the weight's gradient:
    derivatives that leave no gradient in the weight (of the inputs, or a Hessian product) count nothing. Rows of a
    gradient that was thrown away, as a gradient scaler does with one that overflowed, do not count either; when
    the step's gradient was put together from several ones, all rows do.
    """

    def __init__(self, layer: Layer, observer: Observer) -> None:
        self.layer, self.observer = layer, observer
        self.key = layer.weight_names[0]
        self.me = weakref.ref(self)
        self.may_wait = layer.observe is first_input and type(layer.module) is nn.Linear  # is the input saved?
        self.active = True  # is this step's input looked at?
        self.collected: Moments | None = None  # rows of the gradient that is being accumulated
        self.again: Moments | None = None  # those that have made an earlier gradient, too: of a graph that was kept
        self.set_aside: Moments | None = None  # rows of gradients before it, since the last step
        self.gradient = 1  # the number of the one that is being accumulated
        self.traced: Moments | None = None  # rows of compiled calls, whose outputs cannot be hooked
        self.accumulated: tuple[Callable[[], Tensor | None], int] = (_nothing, 0)
        self.shard: Callable[[], Any] = _nothing  # the parameter of FSDP2, which backward passes replace
        self.replaced = False  # did the last backward pass end with another gradient than it had accumulated?
        self.kept_back = False  # does FSDP2 keep the gradient to itself until a later backward pass?
        self.reached: dict[int, _Call] = {}
        self.feeds_batch_norm = False
        self.probed = False  # does somebody ask for the last output?
        self.last_output: tuple[Callable[[], Tensor | None], int] = (_nothing, 0)
        self.hooks: Any = WeakIdKeyDictionary()  # by weight: another may take its place for a call
        self.watched: Callable[[], Tensor | None] = _nothing  # the last one
        drop_inert(layer.module)
        # first of all hooks: FSDP2's puts the weight's shard back
        self.handle = layer.module.register_forward_hook(self, with_kwargs=True, prepend=True)
        self._watch(self.weight)

    @property
    def weight(self) -> Any:
        """The parameter whose gradient tells which rows count."""
        return self.layer.lookup(self.key)

    @property
    def size(self) -> int:
        """Of the moments that are taken."""
        return self.layer.inputs * (self.layer.kernel_size if self.observer.taps else 1)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Takes the moments of this call's input."""
        if not (self.active and module.training and torch.is_grad_enabled()):
            return
        weight = self.weight
        if not weight.requires_grad:
            return
        if _is_traced():
            return
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
            return  # function transforms leave no gradient
        if not compiling and not isinstance(weight, nn.Parameter):
            return  # torch.func.functional_call: the gradient is that of another tensor
        if compiling:  # hooks on nodes would break the graph
            self.traced = _merge(self.traced, self.observer.moments(self.layer, args, kwargs, output))
            return
        seen: Moments | Deferred | None = self.observer.deferred(args, output) if self.may_wait else None
        if seen is None:
            seen = self.observer.moments(self.layer, args, kwargs, output)
        if seen is None:
            return
        if self.watched() is not weight:  # it has been unfrozen or replaced
            self._watch(weight)
        if torch._C._current_graph_task_id() < 0:  # no second forward of checkpointing, within a backward pass
            self.reached.clear()  # what was reached and never counted was no training
        call = _Call(self, seen, weight)
        if isinstance(output, Tensor):
            if self.probed:
                self.last_output = weakref.ref(output), output._version
            _hook(output, call)
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, PackedSequence):  # to older versions of torch no tree
                leaf = leaf.data
            if isinstance(leaf, Tensor):
                _hook(leaf, call)

    def _watch(self, weight: nn.Parameter) -> None:
        if not weight.requires_grad:
            return
        last = self.watched()
        if last is not None and is_sharded(last):  # FSDP2 calls the hooks of shards by itself
            self.hooks.pop(last).remove()
        self.watched = weakref.ref(weight)
        if weight not in self.hooks:
            self.hooks[weight] = weight.register_post_accumulate_grad_hook(_Count(self))

    def remove(self) -> None:
        """Takes the hooks off the module and its weight."""
        self.handle.remove()
        for hook in self.hooks.values():
            hook.remove()

    def begin(self) -> None:
        """A backward pass comes: is the gradient that was being accumulated gone?"""
        if (self.collected is None and self.again is None) or self.kept_back:
            return
        last, version = self.accumulated
        grad: Tensor | None = self.weight.grad
        if grad is None and self.shard() is not None:
            grad = self.shard().grad
        if grad is not None and grad is last() and grad._version == version:
            return
        if grad is None or not bool(local(grad).any()):
            self._set_aside()

    def count(self, weight: Tensor) -> None:
        """The calls that this pass has reached have made a gradient: their rows count, each once."""
        if weight is not self.weight:  # one of torch.func.functional_call
            return
        grad, task = weight.grad, torch._C._current_graph_task_id()
        reached = [call for call in self.reached.values() if call.task == task and call.weight() is weight]
        if not reached and self._is_new(grad):  # of compiled calls, or of none here that had rows
            self._set_aside()
        if self.traced is not None:
            self._collect(self.traced)
            self.traced = None
        for call in reached:
            if not call.counted:
                self._collect(call.moments)
            elif call.counted != self.gradient:
                self.again = _merge(self.again, call.moments)
            call.counted = self.gradient
            del self.reached[id(call)]
        if grad is not None:
            self.accumulated = weakref.ref(grad), grad._version

    def _is_new(self, grad: Tensor | None) -> bool:
        """Has it been accumulated onto nothing, so that the rows before belong to another?"""
        if self.shard() is not None:
            return not self.kept_back and self.shard().grad is None
        if grad is self.accumulated[0]():
            return False
        # one that others have put there, such as a view of a bucket that has been built anew, was written to
        return grad is None or not (self.replaced and grad._version)

    def note_replaced(self) -> None:
        """A backward pass has ended: DistributedDataParallel and FSDP2 may have put another gradient in the place.

        FSDP2 keeps one to itself as long as ranks do not reduce it; nobody can throw that one away.
        """
        weight, last = self.weight, self.accumulated[0]()
        self.replaced = weight.grad is not last
        sharded = is_sharded(weight)
        self.shard, self.kept_back = weakref.ref(weight) if sharded else _nothing, sharded and weight.grad is None
        if weight.grad is not None:
            self.accumulated = weakref.ref(weight.grad), weight.grad._version

    def _collect(self, moments: Moments) -> None:
        self.collected = _merge(self.collected, moments)

    def _set_aside(self) -> None:
        self.set_aside = _merge(self.set_aside, self.collected)
        self.start()

    def start(self) -> None:
        """Another gradient begins."""
        self.collected = self.again = None
        self.gradient += 1

    def ready(self) -> Moments | None:
        """What `take` will return where there was one gradient, of passes that were not compiled; else None."""
        alone = self.traced is None and self.set_aside is None and self.again is None
        return self.collected if self.active and alone else None

    def take(self) -> Moments | None:
        """The moments of the rows that made the gradient, and a fresh start."""
        weight = self.weight
        if self.traced is not None and weight not in self.hooks:  # nobody has seen it accumulate
            self._collect(self.traced)
            self._watch(weight)
        moments, self.traced = self.collected, None
        put_together = self.accumulated[0]() is not weight.grad  # by the caller
        aside = self.set_aside if put_together else None  # the rows that came again are among them
        moments, self.set_aside = _merge(aside or self.again, moments), None
        self.start()
        return moments


class _Call:
    """A hook on the node that made one call's output: says when a backward pass reaches it."""

    __slots__ = "capture", "counted", "seen", "task", "weight"

    def __init__(self, capture: InputCapture, seen: Moments | Deferred, weight: Tensor) -> None:
        self.capture, self.seen, self.weight = capture.me, seen, weakref.ref(weight)
        self.counted = 0  # the last gradient that it counted for
        self.task = -1  # the backward pass that has reached it last

    def __call__(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """Notes the call; where the gradient will be differentiated itself, marks it."""
        capture = self.capture()
        if capture is None:
            return None
        if isinstance(self.seen, Deferred) and self.seen.moments is None:
            capture.observer.settle()
        capture.begin()
        self.task = torch._C._current_graph_task_id()
        capture.reached[id(self)] = self
        if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        marked = tuple(None if g is None else _Mark.apply(g, self.weight()) for g in grads)
        for g in marked:
            if g is not None:
                _hook(g, self)
        return marked

    @property
    def moments(self) -> Moments:
        """Of its input, once it has been reached."""
        if isinstance(self.seen, Deferred):
            assert self.seen.moments is not None
            return self.seen.moments
        return self.seen


class _Mark(torch.autograd.Function):
    """The identity on a gradient, with a node that leads to the weight."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient itself."""
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Of the first argument."""
        return *grads, None


def _is_traced() -> bool:
    """Is the pass one of torch.export or torch.jit.trace? What they write down is the model alone."""
    # not is_exporting(), which older versions of dynamo take for true in every compiled pass
    return torch.jit.is_tracing() or bool(getattr(torch.compiler, _EXPORTING, False))


def _hook(output: Tensor, call: _Call) -> None:
    if output.grad_fn is not None:  # a node's hook takes a third of the time that a tensor's does
        output.grad_fn.register_prehook(call)


class _Count:
    """A hook on a parameter whose gradient has been accumulated."""

    def __init__(self, capture: InputCapture) -> None:
        self.capture = capture.me

    def __call__(self, parameter: Tensor) -> None:
        """Counts the calls that were reached."""
        capture = self.capture()
        if capture is not None:
            capture.count(parameter)
            if dist.is_available() and dist.is_initialized():
                torch.autograd.Variable._execution_engine.queue_callback(capture.note_replaced)


def _merge(a: Moments | None, b: Moments | None) -> Moments | None:
    return a.merge(b) if a is not None and b is not None else a or b
