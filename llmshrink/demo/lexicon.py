"""The words of the demo language.

Each word is one token of the demo's tokenizer, with the space before it; only the first word of `OPENINGS`, which
opens a story, has none. `FUNCTION_WORDS` are all that is in no other list.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Ada Anton Bea Ben Carl Cleo Dan Dora Emil Eva Finn Frida Greta Gwen Hugo Hanna Ida Igor Jon Julia Kira Kurt Leo Lena
    Mira Max Nils Nora Olga Otto Paul Petra Quentin Rosa Rolf Sam Selma Tara Theo Ulf Ursula Vera Viktor Walt Wanda Xena
    Yann Zoe
    """)
TRADES = _words("""
    archer baker barber brewer carpenter cook dancer doctor farmer fisher gardener goldsmith hunter judge mason miller
    nurse painter potter sailor singer tailor teacher weaver
    """)
PLACES = _words("""
    abbey bakery barn castle cave cellar chapel cottage dairy farm forest forge garden harbour inn library market mill
    orchard palace school tower valley village
    """)
THINGS = _words("""
    apple basket bell book boot bowl candle coin comb cup drum feather flute hat kite knife lamp letter mirror needle
    ring rope shell spoon
    """)
COLOURS = _words("black blue brown copper golden green grey orange purple red silver white")
MOODS = _words("angry bold brave calm cheerful cold curious gloomy happy hungry lonely lucky proud sad sleepy tired")
MANNERS = _words("""
    again alone bravely calmly early eagerly gladly happily late loudly proudly quickly quietly sadly slowly soon
    """)
OPENINGS = ("Once", "Long ago", "Last spring", "One winter")
FUNCTION_WORDS = _words("""
    ago spring winter there was the walked to and found visited in gave felt went home lived loved The end Where What
    Who did live love In
    """)
