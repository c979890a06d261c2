"What all drivers share: 64 bits, names that newer NumPy dropped, the job and the answer."
import numpy
import torch

OLD_NAMES = dict(bool8="bool_", float_="float64", complex_="complex128", object0="object_", unicode_="str_", str0="str_",
                 int0="intp", long="int64", int="int64", float="float64", bool="bool_", object="object_", str="str_",
                 complex="complex128")


def prepare():
    "Make RecBole 1.0.1 importable, and compute in 64 bits."
    for name, new in OLD_NAMES.items():
        if name not in numpy.__dict__: setattr(numpy, name, getattr(numpy, new))
    torch.set_default_dtype(torch.float64)


def answer(work):
    "Do the job, and leave the answer where the test finds it."
    torch.save(work(torch.load("job.pt")), "answer.pt")


def gradients(model, loss):
    "Return the gradient of every weight that has one, by name."
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def load(model, weights):
    "Load weights that must fit everything that is trained; what else the model keeps is left alone."
    missing, unexpected = model.double().load_state_dict(weights, strict=False)
    left = set(missing) & {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not unexpected and not left, (unexpected, left)
    return model


def noting(said, name, function):
    "Wrap a function so that what it returns is also written down."
    def wrapped(*args, **options):
        said[name] = function(*args, **options)
        return said[name]
    return wrapped


class WithoutPadding(torch.nn.CrossEntropyLoss):
    "The same cross-entropy, with the padding item taken out of the candidates."
    def forward(self, scores, items): return super().forward(scores[:, 1:], items - 1)
