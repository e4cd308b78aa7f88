"""Structure: what can be renumbered in a model, found from one forward pass, as data."""

from weldnet.structure._bricks import Brick, as_stored, bricks_of
from weldnet.structure._capture import capture
from weldnet.structure._carry import Maps, block_space, carried, carried_rows, partners
from weldnet.structure._check import Check, check, random_renumbering
from weldnet.structure._draw import draw_dot, layer_order
from weldnet.structure._move import axes_in_view, renumber, unit_rows
from weldnet.structure._outputs import output_tensors
from weldnet.structure._power import Power, live_referee, power
from weldnet.structure._referee import Referee
from weldnet.structure._routes import ROUTES
from weldnet.structure._same import same_group
from weldnet.structure._spec import Frozen, Layout, Place, Space, Structure
from weldnet.structure._stored import StoredReferee, build_weightless, without_weights
from weldnet.structure._svg import draw_svg
from weldnet.structure._tree import tree
from weldnet.structure._widen import Wider, used_entries, widened, wider_shape
from weldnet.structure._widths import Shares, blend, require_correspondence

__all__ = [
    "ROUTES",
    "Brick",
    "Check",
    "Frozen",
    "Layout",
    "Maps",
    "Place",
    "Power",
    "Referee",
    "Shares",
    "Space",
    "StoredReferee",
    "Structure",
    "Wider",
    "as_stored",
    "axes_in_view",
    "blend",
    "block_space",
    "bricks_of",
    "build_weightless",
    "capture",
    "carried",
    "carried_rows",
    "check",
    "draw_dot",
    "draw_svg",
    "layer_order",
    "live_referee",
    "output_tensors",
    "partners",
    "power",
    "random_renumbering",
    "renumber",
    "require_correspondence",
    "same_group",
    "tree",
    "unit_rows",
    "used_entries",
    "widened",
    "wider_shape",
    "without_weights",
]
