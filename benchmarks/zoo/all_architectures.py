"""The architectures of the zoo, by name."""

from benchmarks.zoo import library_models, own_models
from benchmarks.zoo.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    one.name: one for one in (*own_models.ARCHITECTURES, *library_models.ARCHITECTURES)
}
