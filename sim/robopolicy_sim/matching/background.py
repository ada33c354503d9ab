"""Visual matching: a photograph of the real scene stands behind the simulated arm and objects.

After SIMPLER (Li et al., CoRL 2024, "visual matching"): image = simulation * (1 - m) + photograph * m, with m from the
renderer's segmentation: 0 on the foreground, 1 elsewhere. The photograph shows the scene without robot and objects.
It has no depth: everything simulated is in front of it, and simulated shadows fall on the foreground only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import mujoco
import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import gaussian_filter

from robopolicy_sim.rendering import CameraRenderer, RenderQuality

MODES = ("background", "background+object", "debug")
SCENERY = ("bench",)  # bodies that are no foreground, beside what is fixed to the world
ASPECT_TOLERANCE = 0.01
DEBUG_BLEND = 0.5
GEOM = int(mujoco.mjtObj.mjOBJ_GEOM)  # an enum would be compared pixel by pixel in Python


class Scene(Protocol):
    """An arm task, as `photograph` needs it."""

    model: mujoco.MjModel
    data: mujoco.MjData

    @property
    def arm(self) -> Any: ...


@dataclass(frozen=True)
class Background:
    """The option ``background`` of arm tasks.

    Attributes:
        photo: image file of the real scene from ``camera``'s viewpoint, without robot and objects.
        camera: a camera that does not move.
        keep: further bodies or geoms that stay simulated, e.g. ``bench``.
        overlay: bodies or geoms that the photograph replaces although they would be foreground.
        mode: ``background``: robot and objects stay simulated; ``background+object``: only the robot; ``debug``:
            photograph and simulation are blended half and half, to see whether the cameras agree.
        soft_edge: standard deviation in pixels of the mask's blur; 0 keeps sharp edges.
    """

    photo: str
    camera: str = "scene"
    keep: tuple[str, ...] = ()
    overlay: tuple[str, ...] = ()
    mode: str = "background"
    soft_edge: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"background: mode '{self.mode}' is unknown; choose one of {', '.join(MODES)}.")
        if not self.soft_edge >= 0:
            raise ValueError(f"background: soft_edge is {self.soft_edge}, wanted pixels, at least 0.")
        for name in ("keep", "overlay"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"background: {name} is '{getattr(self, name)}', wanted a list of names.")
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def from_json(cls, option: Mapping[str, Any]) -> Background:
        """Read the option.

        Raises:
            ValueError: a key is unknown, the photograph is not given, or a value is impossible.
        """
        known = [entry.name for entry in fields(cls)]
        unknown = [key for key in option if key not in known]
        if unknown:
            raise ValueError(f"background: '{unknown[0]}' is unknown; it has {', '.join(known)}.")
        if not isinstance(option.get("photo"), str):
            raise ValueError(f"background: photo is {option.get('photo')!r}, wanted the path of an image file.")
        return cls(**option)


class PhotoLayer:
    """A photograph and which geoms of a model stand before it.

    Args:
        background: the option.
        model: of the scene.
        robot: name of the arm's root body.

    Raises:
        ValueError: the camera or a name does not exist, the camera moves, or the photograph cannot be read.
    """

    def __init__(self, background: Background, model: mujoco.MjModel, robot: str) -> None:
        _check_fixed_camera(model, background.camera)
        self.background = background
        self._photo = read_photo(background.photo)
        self._resized_photos: dict[tuple[int, int], np.ndarray] = {}
        shown = geoms_of(model, [robot]) if background.mode == "background+object" else foreground_geoms(model)
        shown = (shown | geoms_of(model, background.keep)) & ~geoms_of(model, background.overlay)
        # One entry more: -1 stands for "no geom" in a segmentation.
        self._photo_share = np.append(1.0 - shown, 1.0).astype(np.float32)

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether an image of ``size = (height, width)`` has the photograph's aspect ratio within 1 %."""
        height, width = self._photo.shape[:2]
        return abs(size[1] / size[0] / (width / height) - 1) <= ASPECT_TOLERANCE

    def check_size(self, size: tuple[int, int]) -> None:
        """Check that the photograph covers an image of ``size = (height, width)``.

        Raises:
            ValueError: the aspect ratios differ.
        """
        if not self.fits(size):
            height, width = self._photo.shape[:2]
            raise ValueError(
                f"{self.background.photo}: the photograph has {width} x {height} pixels, the images of camera "
                f"'{self.background.camera}' {size[1]} x {size[0]}. Crop it to the same aspect ratio."
            )

    def compose(self, image: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
        """Put the photograph behind the foreground.

        Args:
            image: (H, W, 3) uint8, the simulation.
            segmentation: (H, W, 2) int32, object id and `mujoco.mjtObj` for each pixel; -1 where there is nothing.
        """
        photo = self._resized(image.shape[:2])
        if self.background.mode == "debug":
            share = np.full(image.shape[:2], DEBUG_BLEND, np.float32)
        else:
            geoms = np.where(segmentation[..., 1] == GEOM, segmentation[..., 0], -1)
            share = self._photo_share[geoms]
            if self.background.soft_edge == 0:
                return np.where(share[..., None] > 0, photo, image)
            share = gaussian_filter(share, self.background.soft_edge)
        mixed = image + share[..., None] * (photo.astype(np.float32) - image)
        return np.rint(mixed).astype(np.uint8)

    def _resized(self, size: tuple[int, int]) -> np.ndarray:
        if size not in self._resized_photos:
            height, width = size
            picture = Image.fromarray(self._photo).resize((width, height), Image.Resampling.LANCZOS)
            self._resized_photos[size] = np.asarray(picture)
        return self._resized_photos[size]


class PhotoRenderer(CameraRenderer):
    """Renders as `CameraRenderer` does, with the photograph behind the images of its camera.

    Images of another aspect ratio than the photograph's (videos, as a rule) stay plain simulation.
    """

    def __init__(self, model: mujoco.MjModel, quality: RenderQuality, layer: PhotoLayer) -> None:
        super().__init__(model, quality)
        self._layer = layer

    def render(self, data: mujoco.MjData, camera: str, size: tuple[int, int]) -> np.ndarray:
        image = super().render(data, camera, size)
        if camera != self._layer.background.camera or not self._layer.fits(size):
            return image
        return self._layer.compose(image, self._segmentation(size))

    def _segmentation(self, size: tuple[int, int]) -> np.ndarray:
        """Ids and types (H, W, 2) of what the last image of this size shows."""
        renderer = self._renderers[size]
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.enable_segmentation_rendering()
        try:
            return renderer.render()
        finally:
            renderer.disable_segmentation_rendering()
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._shadows


def read_photo(path: str) -> np.ndarray:
    """Read an image file, (H, W, 3) uint8 RGB.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: the photograph cannot be read ({error}); give a PNG or JPEG file.") from error


def photograph(scene: Scene, camera: str, size: tuple[int, int], *, quality: RenderQuality | None = None) -> np.ndarray:
    """The image (H, W, 3) uint8 that a fixed camera has of a scene without robot and objects.

    It stands in for a real photograph where the "real" scene is itself a simulation.

    Args:
        scene: an arm task (``env.unwrapped``) after ``reset``; it is not changed.
        camera: name of the camera.
        size: (height, width) in pixels.
        quality: of the rendering; by default shadows of 1024 pixels.
    """
    model = scene.model
    _check_fixed_camera(model, camera)
    hidden = foreground_geoms(model)
    groups = model.geom_group.copy()
    model.geom_group[hidden] = mujoco.mjNGROUP - 1  # the last group is not drawn
    renderer = CameraRenderer(model, quality or RenderQuality(shadow_size=1024))
    try:
        return renderer.render(scene.data, camera, size)
    finally:
        renderer.close()
        model.geom_group[:] = groups


def foreground_geoms(model: mujoco.MjModel) -> np.ndarray:
    """Which geoms belong to the robot or to objects, (ngeom,) bool: all that are not the world's or the bench's."""
    return (model.geom_bodyid != 0) & ~geoms_of(model, [name for name in SCENERY if _has_body(model, name)])


def geoms_of(model: mujoco.MjModel, names: Sequence[str]) -> np.ndarray:
    """Which geoms are named, or belong to a named body or to what is mounted on it, (ngeom,) bool.

    Raises:
        ValueError: a name is neither a body nor a geom.
    """
    selected = np.zeros(model.ngeom, bool)
    for name in names:
        if _has_body(model, name):
            selected |= _subtree(model, model.body(name).id)[model.geom_bodyid]
        elif (geom := mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, name)) >= 0:
            selected[geom] = True
        else:
            bodies = ", ".join(model.body(i).name for i in range(1, model.nbody))
            raise ValueError(f"'{name}' is neither a body nor a geom of the scene; its bodies are {bodies}.")
    return selected


def _subtree(model: mujoco.MjModel, root: int) -> np.ndarray:
    """Which bodies are ``root`` or mounted on it, (nbody,) bool."""
    inside = np.zeros(model.nbody, bool)
    inside[root] = True
    for body in range(root + 1, model.nbody):  # parents come before their children
        inside[body] = inside[model.body_parentid[body]]
    return inside


def _has_body(model: mujoco.MjModel, name: str) -> bool:
    return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name) >= 0


def _check_fixed_camera(model: mujoco.MjModel, camera: str) -> None:
    names = [model.camera(i).name for i in range(model.ncam)]
    if camera not in names:
        raise ValueError(f"background: there is no camera '{camera}'; the scene has {', '.join(names)}.")
    index = names.index(camera)
    mounted_on = model.cam_bodyid[index]
    if model.body_weldid[mounted_on] != 0 or model.cam_mode[index] != mujoco.mjtCamLight.mjCAMLIGHT_FIXED:
        raise ValueError(
            f"background: camera '{camera}' moves (it is mounted on '{model.body(mounted_on).name}'), so that no "
            "photograph fits; choose a fixed camera."
        )
