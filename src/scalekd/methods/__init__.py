"""Distillation methods, by the name that a recipe uses.

The contract (nobody inherits it; write an `nn.Module` that has it):

- `__init__(self, student: Shapes, teacher: Shapes | None, *, option=default, ...)`. A method sees
  shapes when it is built, never a model. Every option has a type annotation and a default: a recipe's
  options are checked against this signature, and it is the one place where defaults live.
  Raise `ValueError` when the pair cannot be served: one or two lines, with the way out. Without a
  teacher that is needed, it says `needs a teacher`.
- `forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]`.
  Targets are class indices `(B,)` or probabilities `(B, classes)`. Each value is a scalar with
  the method's own weights applied; the step adds them up, times the recipe's `weight`. A term
  is logged as `method.term`; one with the method's own name as that name alone. The student's
  tensors carry a gradient; detach the teacher's. Under autocast maps and logits may be in half
  precision: compute losses in float32.
- Every parameter gets a gradient at every step: build none that an option leaves unused.
- Class attributes `needs_teacher` and `needs_maps` (both True unless said): a recipe in which nothing
  needs maps asks only for logits, so any timm model will do. With `needs_classifier = True` (False unless
  said) a method gets the teacher's `pooled` and `classify`, if `teacher.pooled` at build says that it has them.
- `needs_targets = True` (False unless said) for a method that reads the targets: where a batch has images
  without labels too, it gets the labelled ones alone. `needs_logits = True` for one that reads the student's
  logits beside maps: where nothing does, a recipe's student is built without a classifier.

An entry may also be a function with the same signature that returns such a module.
docs/how-to/add-a-method.md walks through an example.
"""
