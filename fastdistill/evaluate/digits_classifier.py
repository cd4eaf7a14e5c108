"""A small classifier of scikit-learn's 8 x 8 digits: the feature space in which digits are judged.

Trained where it is needed, in about a second on one CPU thread, from data that scikit-learn ships:
nothing is downloaded. The same weights bit for bit on one machine, whatever the caller's random
state, default dtype or device, thread count or gradient mode; all of these are left as they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdistill.evaluate._threads import one_thread

SEED = 20260101
HELD_OUT = 450  # of 1,797 images
EPOCHS = 15
BATCH = 64
LEARNING_RATE = 2e-3
ROWS_AT_ONCE = 4096
KIND = "fastdistill digits classifier 1"


class DigitsClassifier(nn.Module):
    """Two convolutions, a 64-dimensional penultimate layer, ten classes; frozen.

    SiLU, not ReLU: after ReLU a third of the features are dead, and say nothing of a generator.
    Features are centred on the training images' mean: distances do not see it, but cosines do,
    and without it all images point nearly the same way (Vendi score of all digits 3.3, not 10.9).
    """

    classes = 10
    feature_size = 64

    def __init__(self, weights: Mapping[str, Tensor], held_out_accuracy: float) -> None:
        super().__init__()
        self.held_out_accuracy = held_out_accuracy
        """Share of the fixed held-out split that it labels correctly"""
        with torch.device("meta"):
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.SiLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * 4 * 4, self.feature_size),
                nn.SiLU(),
            )
            self.head = nn.Linear(self.feature_size, self.classes)
            self.centre: Tensor
            self.register_buffer("centre", torch.zeros(self.feature_size))
        self.load_state_dict(weights, assign=True)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, 8, 8]; differentiable in the images."""
        logits: Tensor = self.head(self.body(images) - self.centre)
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, centred on the mean of the training images.

        Args:
            images: floating-point images [n, 1, 8, 8] in [-1, 1], on any device.

        Returns:
            Features [n, 64] in the weights' dtype (float32) on their device, without a graph.

        Raises:
            ValueError: images of another shape or not floating point.
        """
        if images.shape[1:] != (1, 8, 8) or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; expected "
                "floating-point [n, 1, 8, 8]"
            )
        images = images.to(self.head.weight)
        return torch.cat([self.body(chunk) - self.centre for chunk in images.split(ROWS_AT_ONCE)])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Labels [n] (int64) of images [n, 1, 8, 8]; arguments and errors as in `features`."""
        labels: Tensor = self.head(self.features(images)).argmax(1)
        return labels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and accuracy to a safetensors file, which is never seen half-written."""
        from safetensors.torch import save

        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        metadata = {"kind": KIND, "held_out_accuracy": repr(self.held_out_accuracy)}
        target = Path(path)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        part.write_bytes(save(weights, metadata))
        part.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DigitsClassifier:
        """Read what `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or is not a digits classifier.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                # Copies: the tensors are views of the mapped file, and fault when it is rewritten.
                weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if metadata.get("kind") != KIND:
                raise ValueError(f"its kind is {metadata.get('kind')!r}, not {KIND!r}")
            if not all(_sound(value) for value in weights.values()):
                raise ValueError("its weights are not finite float32")
            return cls(weights, float(metadata["held_out_accuracy"]))
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a digits classifier: {error}") from error


def _sound(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and bool(weight.isfinite().all())


def digits_classifier() -> DigitsClassifier:
    """Train the classifier on a fixed split of scikit-learn's digits (see the module's docstring).

    Adam with a linearly falling learning rate on cross-entropy; takes about a second.

    Returns:
        The classifier on the CPU, in float32, with ``held_out_accuracy`` filled in.
    """
    with _isolated():
        images, labels = _digits()  # [1797, 1, 8, 8], [1797]
        generator = torch.Generator("cpu").manual_seed(SEED)
        order = torch.randperm(labels.shape[0], generator=generator)
        held_out, train = order[:HELD_OUT], order[HELD_OUT:]
        weights = _initial_weights(generator)
        classifier = DigitsClassifier(weights, held_out_accuracy=float("nan"))
        _train(classifier, images[train], labels[train], generator)
        _centre(classifier, images[train])
        right = classifier.predict(images[held_out]) == labels[held_out]
        classifier.held_out_accuracy = float(right.double().mean())
    return classifier


@contextmanager
def _isolated() -> Iterator[None]:
    """One thread, the CPU, gradients on, no autocast; all as before on leaving."""
    with (
        one_thread(),
        torch.device("cpu"),
        torch.inference_mode(False),  # gradients on, under no_grad too
        torch.autocast("cpu", enabled=False),
    ):
        yield


def _digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] (float32) and labels [1797] (int64) of all digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # 0 to 16  # [1797, 64]
    images = torch.from_numpy(pixels).to(torch.float32).view(-1, 1, 8, 8) / 8.0 - 1.0
    return images, torch.from_numpy(labels).long()


def _initial_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Normal weights of variance 2 / fan-in (He et al. 2015, equation 10); the rest is zero."""
    shapes = {
        "body.0": (16, 1, 3, 3),
        "body.2": (32, 16, 3, 3),
        "body.6": (64, 512),
        "head": (10, 64),
    }
    weights = {"centre": torch.zeros(64, dtype=torch.float32)}
    for name, shape in shapes.items():
        normal = torch.randn(shape, generator=generator, dtype=torch.float32)
        weights[f"{name}.weight"] = normal * (2.0 / normal[0].numel()) ** 0.5
        weights[f"{name}.bias"] = torch.zeros(shape[0], dtype=torch.float32)
    return weights


def _train(
    classifier: DigitsClassifier, images: Tensor, labels: Tensor, generator: torch.Generator
) -> None:
    """Fit to images [n, 1, 8, 8] and labels [n]; the batches' order comes from the generator."""
    classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE, foreach=False)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1.0 - epoch / EPOCHS)
        order = torch.randperm(labels.shape[0], generator=generator)
        for rows in order.split(BATCH):
            loss = functional.cross_entropy(classifier(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    classifier.zero_grad()
    classifier.requires_grad_(False)


@torch.no_grad()
def _centre(classifier: DigitsClassifier, images: Tensor) -> None:
    """Subtract the features' mean over images [n, 1, 8, 8], and give it back in the head's bias."""
    mean = classifier.features(images).mean(0)  # [64]
    classifier.centre.add_(mean)
    classifier.head.bias.add_(classifier.head.weight @ mean)
