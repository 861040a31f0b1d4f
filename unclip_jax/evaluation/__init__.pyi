from .features import clip_features as clip_features
from .features import embed_texts as embed_texts
from .features import inception_features as inception_features
from .similarity import cosines as cosines
from .similarity import diversity as diversity
