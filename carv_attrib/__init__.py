"""Which training examples made a diffusion model produce this image, and how sure are we?"""

from carv_attrib.attributor import Attributor
from carv_attrib.pipeline import featurize
from carv_attrib.teachers import load_teacher

__all__ = ["Attributor", "featurize", "load_teacher"]
