from .hosts import join as join
from .mesh import Chunk as Chunk
from .mesh import local_mesh as local_mesh
from .mesh import make_chunk as make_chunk
