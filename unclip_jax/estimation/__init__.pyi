from .colours import depth_picture as depth_picture
from .colours import nearness_picture as nearness_picture
from .colours import normals_picture as normals_picture
from .ensemble import ensemble_depth as ensemble_depth
from .ensemble import ensemble_normals as ensemble_normals
