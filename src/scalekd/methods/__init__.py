"""Distillation methods. This page defines what a method is; docs/how-to/add-a-method.md has two complete examples.

A method is an `nn.Module` in its own file here, with an entry in the dict `METHODS` of `names.py`, whose key is its
name in recipes. There is no base class. An entry may also be a function with the signature of `__init__` that returns a
module.

Construction: `__init__(self, student: Shapes, teacher: Shapes | None, *, option=default, ...)`

- A method gets shapes (`scalekd.models.stages.Shapes`), never a model: `student.maps` are the shapes `(channels,
  height, width)` of the four stage maps, `student.final` that of the map after the final norm, `student.classes` the
  number of classes.
- Options are keyword-only, with a type annotation and a default. Recipes are checked against this signature, which is
  the only place for defaults.
- Raise `ValueError` if the method cannot work with these models or options. The message says in one or two lines what
  is wrong and how to fix it. If a required teacher is None, it contains `needs a teacher`. `shared.py` has the usual
  checks.
- Every parameter must get a gradient at every step: do not build parameters that an option leaves unused. Parameters
  and buffers are saved in checkpoints; parameters are trained with the student; neither is exported.

Step: `forward(self, student: Features, teacher: Features | None, targets: Tensor) -> dict[str, Tensor]`

- `student` and `teacher` have `logits` `(B, classes)` and, for methods with `needs_maps`, `maps` (four, `(B, D, H, W)`)
  and `final`. The student's tensors have a gradient. Detach the teacher's.
- `targets` are class indices `(B,)` or, with Mixup or CutMix, probabilities `(B, classes)`.
- The result has one scalar per term, with the method's own weights applied. The step multiplies them by the recipe's
  `weight` and adds up all methods. The log names a term `method.term`, or `method` if the term has the method's name.
- Under autocast, maps and logits may be in half precision: convert them to float32 (`shared.full_precision`), and switch
  autocast off around matrix products and convolutions of the loss, which it would compute in half precision again.
- Do not read values of tensors on the host (`.item()`, `if loss > 0`), and do not create tensors from Python numbers: the
  step must not wait for a GPU, and `train.compile` traces it as one graph.
- Draw random numbers from torch's global generator, which is seeded for every step.

Class attributes, with the value that a method has if it does not set them:

- `needs_teacher = True`: set it to False if the method uses no teacher.
- `needs_maps = True`: set it to False if the method uses logits only. If no loss of a recipe needs maps, any timm model
  can be used.
- `needs_classifier = False`: set it to True to get the input of the teacher's classifier, `teacher.pooled`, and the
  classifier, `teacher.classify`. At construction, `teacher.pooled` is the number of its channels, or 0 if the teacher's
  logits are not the output of one classifier.
- `needs_pooled = False`: set it to True to get the classifier's input of both models, as `student.pooled` and
  `teacher.pooled`; None for a model whose logits are not the output of one classifier. `pooled` of their shapes is the
  number of its channels, or 0.
- `images_to_measure = 0`: set it to a number of images if the method measures its teacher before the first step. It then
  has `observe(teacher: Features)`, called for each batch, and `freeze()`, called once, which sets it to 0. `Standardise`
  in `standardise.py` is an example. The state that results belongs in buffers.
- `teacher_drop = 0.0`: set it to a probability to leave out teachers at random if there are several (UNIC,
  arXiv:2408.05088). The terms then have one value per image, `(B,)`.
- `takes_top_k = False`: set it to True if the method compares probabilities at `self.temperature` (1 if it has none), so
  that it is nearly right if the teacher's small logits are replaced by equal ones (`teacher.top_k`).
- `needs_targets = False`: set it to True if the method uses `targets`. If a batch also has images without labels, the
  method then gets only the labelled ones.
- `needs_logits = False`: set it to True if the method uses the student's logits in addition to maps. If no loss uses
  them, the student is built without a classifier.
- `needs_again = False`: set it to True to run the student once more in a step, on other images: `student.images` are its
  normalised images, and `student.again(images)` are its features of others. At construction, `student.image` is their
  shape. Students with batch norms are rejected, because their statistics would change.
- `needs_two_heads = False`: set it to True to get the logits of the student's second head, `student.distilled`, in train
  mode. `student.logits` are then those of the first head, for all losses. At construction, `student.two_heads` says
  whether the student has one.
"""
