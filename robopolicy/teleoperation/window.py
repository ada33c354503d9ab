"""The window of an operator: the scene, what the wrist sees, the state of the session, the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pygame

from robopolicy.errors import UserError

SIZE = (960, 720)  # width, height in pixels at the start; the window can be resized
INSET_SHARE = 0.28  # side of the inset, as a share of the window's height
FONT_SHARE = 0.028  # height of a line of text, as a share of the window's height
WHITE, GREY, RED, YELLOW = (240, 240, 240), (170, 175, 180), (240, 80, 70), (245, 200, 70)
SHADE = (12, 14, 18, 185)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    """A line of the overlay; a colour of its own for what needs attention."""

    text: str
    colour: Colour = WHITE


@dataclass(frozen=True)
class View:
    """What the window shows.

    Attributes:
        scene: (height, width, 3) uint8 RGB, fills the window.
        inset: a second image in the upper right corner, or None.
        lines: text in the upper left corner.
        hints: keys and what they do, along the lower edge.
    """

    scene: np.ndarray
    inset: np.ndarray | None
    lines: Sequence[Line]
    hints: Sequence[tuple[str, str]]


class Window:
    """A pygame window; without a display set the environment variable SDL_VIDEODRIVER=dummy."""

    def __init__(self, title: str) -> None:
        """Open the window.

        Raises:
            UserError: there is no display.
        """
        try:
            pygame.display.init()
            self.surface = pygame.display.set_mode(SIZE, pygame.RESIZABLE)
        except pygame.error as error:
            raise UserError(
                f"The window cannot be opened: {error}. Run this where you have a display: at the machine itself, "
                "or with a forwarded one (ssh -X)."
            ) from error
        pygame.font.init()
        pygame.display.set_caption(title)

    def events(self) -> list[pygame.event.Event]:
        """Everything that happened since the last call."""
        return pygame.event.get()

    def show(self, view: View) -> None:
        """Draw and present a view."""
        self.surface = pygame.display.get_surface()
        width, height = self.surface.get_size()
        font = pygame.font.Font(None, max(14, round(1.35 * FONT_SHARE * height)))
        self.surface.fill((0, 0, 0))
        _blit_fitted(self.surface, view.scene, pygame.Rect(0, 0, width, height))
        margin = round(0.5 * FONT_SHARE * height)
        if view.inset is not None:
            side = round(INSET_SHARE * height)
            frame = pygame.Rect(width - side - margin, margin, side, side)
            pygame.draw.rect(self.surface, WHITE, _blit_fitted(self.surface, view.inset, frame).inflate(4, 4), 2)
        _draw_lines(self.surface, font, view.lines, margin)
        _draw_hints(self.surface, font, view.hints, margin)
        pygame.display.flip()

    def close(self) -> None:
        """Close the window."""
        pygame.display.quit()


def _blit_fitted(surface: pygame.Surface, image: np.ndarray, frame: pygame.Rect) -> pygame.Rect:
    """Draw an image as large as it fits into a frame, in its middle; returns where it is."""
    height, width = image.shape[:2]
    scale = min(frame.width / width, frame.height / height)
    picture = pygame.image.frombuffer(np.ascontiguousarray(image).tobytes(), (width, height), "RGB")
    picture = pygame.transform.smoothscale(picture, (round(width * scale), round(height * scale)))
    return surface.blit(picture, picture.get_rect(center=frame.center))


def _draw_lines(surface: pygame.Surface, font: pygame.font.Font, lines: Sequence[Line], margin: int) -> None:
    texts = [font.render(line.text, True, line.colour) for line in lines if line.text]
    step = font.get_linesize()
    _shade(surface, pygame.Rect(0, 0, max(t.get_width() for t in texts) + 2 * margin, step * len(texts) + 2 * margin))
    for row, text in enumerate(texts):
        surface.blit(text, (margin, margin + row * step))


def _draw_hints(surface: pygame.Surface, font: pygame.font.Font, hints: Sequence[tuple[str, str]], margin: int) -> None:
    """Keys and their meaning in as many rows as they need, from left to right."""
    items = [(font.render(key, True, YELLOW), font.render(meaning, True, GREY)) for key, meaning in hints]
    places, x, row = [], margin, 0
    for key, meaning in items:
        width = key.get_width() + meaning.get_width() + 3 * margin
        if x > margin and x + width > surface.get_width():
            x, row = margin, row + 1
        places.append((x, row))
        x += width
    step = font.get_linesize()
    top = surface.get_height() - (row + 1) * step - 2 * margin
    _shade(surface, pygame.Rect(0, top, surface.get_width(), surface.get_height() - top))
    for (key, meaning), (x, row) in zip(items, places, strict=True):
        y = top + margin + row * step
        surface.blit(key, (x, y))
        surface.blit(meaning, (x + key.get_width() + margin, y))


def _shade(surface: pygame.Surface, area: pygame.Rect) -> None:
    veil = pygame.Surface(area.size, pygame.SRCALPHA)
    veil.fill(SHADE)
    surface.blit(veil, area)
