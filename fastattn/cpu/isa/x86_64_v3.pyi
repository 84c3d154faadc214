from .baseline import Prepared as Prepared
from .baseline import address as address
from .baseline import backward as backward
from .baseline import prepare as prepare
from .baseline import row_bounds as row_bounds
from .baseline import transform as transform
from .baseline import transform_backward as transform_backward
from .baseline import vector_length as vector_length
