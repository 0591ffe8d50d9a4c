"""TEKFAC on VGG-mini with half of the epochs, and a schedule of that length.

Takes two to four minutes on two CPU cores. Compare its last loss and accuracy with what the others
reach in 6 epochs (`reading_vggmini_cifar10`).
``python -m benchmarks.paper half_vggmini_cifar10 --data DIR``
"""

from benchmarks.experiments.reading_vggmini_cifar10 import EXPERIMENT as READING

EXPERIMENT = READING._replace(
    title="VGG-mini on 10,000 images of CIFAR-10, TEKFAC with half of the epochs",
    entries=READING.entries[:1],
    epochs=3,
)
