from .parts import Parts as Parts
from .pipeline import Pipeline as Pipeline
from .request import Conditions as Conditions
from .request import Request as Request
from .request import Task as Task
