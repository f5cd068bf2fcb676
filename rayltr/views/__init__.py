"""Augmentations of a whole batch: `(images [B, 3, H, W] float in [0, 1], generator, *, ...) -> images`.

Every image gets its own parameters, drawn on the generator's device in a few calls; nothing loops over images.  The
same state of the generator gives the same pixels.  Views come before the normalisation, so what they leave empty is
black (0) unless they have a `fill`.  Shape (but for a `size`), dtype and range (but for the noise of `erasing`) are
kept; results are channels last.  Operations on colours and levels give the pixels that Pillow gives for the same
parameters, and those are drawn as torchvision or timm draw them.
"""

from rayltr.views.colours import blur, colour_jitter, grayscale, simaugment
from rayltr.views.crops import cutout, erasing, flip_crop, identity, resized_crop
from rayltr.views.policies import autoaugment, randaugment

VIEWS = {
    f.__name__: f
    for f in (
        identity,
        flip_crop,
        cutout,
        erasing,
        resized_crop,
        colour_jitter,
        grayscale,
        blur,
        autoaugment,
        randaugment,
        simaugment,
    )
}
