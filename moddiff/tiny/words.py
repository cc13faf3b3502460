"""How is a scene said?  The words and sentences of the tiny world in English, Spanish, German and Chinese.

`TEMPLATES[language][things]` lists the sentences, the canonical form first. In them t is the one thing, u the
upper and v the lower of two, each with the phrases that its language makes of it, and b the background.
`LEXICON` maps every phrase that a sentence can hold to its meaning: (kind, value), where kind "grammar"
carries none of its own.
"""

from types import SimpleNamespace as Phrases

LANGUAGES = ("en", "es", "de", "zh")

# ---- English -----------------------------------------------------------------------------------------------

EN_VERB = {
    "moving left": "moves left",
    "moving right": "moves right",
    "moving up": "moves up",
    "moving down": "moves down",
    "standing still": "stands still",
    "growing": "grows",
    "shrinking": "shrinks",
}


def _english(thing):
    name = f"{thing.colour} {thing.shape}"
    article = "an" if thing.colour == "orange" else "a"
    return Phrases(
        name=name, a=f"{article} {name}", the=f"the {name}", ing=thing.motion, verb=EN_VERB[thing.motion]
    )


ENGLISH = {
    1: [
        "{t.a} {t.ing} on a {b} background",
        "{t.a} {t.verb} on a {b} background",
        "{t.a} {t.verb} on {b}",
        "{t.a} {t.ing} on {b}",
        "{t.a} is {t.ing} on a {b} background",
        "{t.the} is {t.ing} on a {b} background",
        "on a {b} background, {t.a} {t.verb}",
        "on a {b} background {t.a} is {t.ing}",
        "a {b} background with {t.a} {t.ing}",
        "{t.name} {t.ing}, {b} background",
        "{t.a} {t.verb}",
        "{t.a} {t.ing}",
        "{t.the} is {t.ing}",
    ],
    2: [
        "{u.a} {u.ing} above {v.a} {v.ing} on a {b} background",
        "{v.a} {v.ing} below {u.a} {u.ing} on a {b} background",
        "{u.a} {u.verb} above {v.a} that {v.verb} on a {b} background",
        "{v.a} {v.verb} below {u.a} that {u.verb} on a {b} background",
        "on a {b} background, {u.a} {u.ing} above {v.a} {v.ing}",
        "on a {b} background, {v.a} {v.ing} below {u.a} {u.ing}",
        "{u.a} {u.ing} at the top and {v.a} {v.ing} at the bottom, on a {b} background",
        "{u.the} is {u.ing} above {v.the} {v.ing} on {b}",
        "{u.a} {u.ing} above {v.a} {v.ing} on {b}",
        "{u.a} {u.ing} above {v.a} {v.ing}",
        "{v.a} {v.ing} below {u.a} {u.ing}",
    ],
}

# ---- Spanish -----------------------------------------------------------------------------------------------

ES_SHAPE = {"circle": "círculo", "square": "cuadrado", "triangle": "triángulo", "star": "estrella"}
ES_COLOUR = {
    "red": ("rojo", "roja"),
    "green": ("verde", "verde"),
    "blue": ("azul", "azul"),
    "yellow": ("amarillo", "amarilla"),
    "purple": ("morado", "morada"),
    "orange": ("naranja", "naranja"),
    "white": ("blanco", "blanca"),
}
ES_BACKGROUND = {"black": "negro", "gray": "gris", "brown": "marrón", "navy": "azul marino"}
ES_MOTION = {  # participle and verb
    "moving left": ("moviéndose hacia la izquierda", "se mueve hacia la izquierda"),
    "moving right": ("moviéndose hacia la derecha", "se mueve hacia la derecha"),
    "moving up": ("moviéndose hacia arriba", "se mueve hacia arriba"),
    "moving down": ("moviéndose hacia abajo", "se mueve hacia abajo"),
    "standing still": ("quiet{ending}", "está quiet{ending}"),
    "growing": ("creciendo", "crece"),
    "shrinking": ("encogiéndose", "se encoge"),
}


def _spanish(thing):
    feminine = thing.shape == "star"
    name = f"{ES_SHAPE[thing.shape]} {ES_COLOUR[thing.colour][feminine]}"
    ing, verb = (motion.format(ending="oa"[feminine]) for motion in ES_MOTION[thing.motion])
    return Phrases(
        un=f"{('un', 'una')[feminine]} {name}", el=f"{('el', 'la')[feminine]} {name}", ing=ing, verb=verb
    )


SPANISH = {
    1: [
        "{t.un} {t.ing} sobre un fondo {b}",
        "{t.un} {t.verb} sobre un fondo {b}",
        "{t.un} que {t.verb} sobre un fondo {b}",
        "{t.el} {t.verb} sobre un fondo {b}",
        "sobre un fondo {b}, {t.un} {t.verb}",
        "{t.un} {t.ing}, fondo {b}",
        "{t.un} {t.ing}",
        "{t.un} {t.verb}",
    ],
    2: [
        "{u.un} {u.ing} encima de {v.un} {v.ing} sobre un fondo {b}",
        "{v.un} {v.ing} debajo de {u.un} {u.ing} sobre un fondo {b}",
        "{u.un} que {u.verb} encima de {v.un} que {v.verb} sobre un fondo {b}",
        "sobre un fondo {b}, {u.un} {u.ing} encima de {v.un} {v.ing}",
        "sobre un fondo {b}, {v.un} {v.ing} debajo de {u.un} {u.ing}",
        "{u.un} {u.ing} encima de {v.un} {v.ing}",
    ],
}

# ---- German ------------------------------------------------------------------------------------------------

DE_SHAPE = {  # with article and the ending of an adjective after "ein"
    "circle": ("Kreis", "der", "er"),
    "square": ("Quadrat", "das", "es"),
    "triangle": ("Dreieck", "das", "es"),
    "star": ("Stern", "der", "er"),
}
DE_COLOUR = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "violett",
    "orange": "orangefarben",
    "white": "weiß",
}
# In the dative, as after "auf" and "vor".
DE_BACKGROUND = {"black": "schwarzem", "gray": "grauem", "brown": "braunem", "navy": "marineblauem"}
DE_MOTION = {  # verb, what comes after the subject or the verb, and the order of a subordinate clause
    "moving left": ("bewegt sich", " nach links", "sich nach links bewegt"),
    "moving right": ("bewegt sich", " nach rechts", "sich nach rechts bewegt"),
    "moving up": ("bewegt sich", " nach oben", "sich nach oben bewegt"),
    "moving down": ("bewegt sich", " nach unten", "sich nach unten bewegt"),
    "standing still": ("steht", " still", "stillsteht"),
    "growing": ("wächst", "", "wächst"),
    "shrinking": ("schrumpft", "", "schrumpft"),
}


def _german(thing):
    noun, article, ending = DE_SHAPE[thing.shape]
    colour = DE_COLOUR[thing.colour]
    verb, rest, clause = DE_MOTION[thing.motion]
    return Phrases(
        ein=f"ein {colour}{ending} {noun}",
        der=f"{article} {colour}e {noun}",
        einem=f"einem {colour}en {noun}",
        clause=f"{article} {clause}",
        verb=verb,
        rest=rest,
    )


GERMAN = {
    1: [
        "{t.ein}, {t.clause}, auf {b} Hintergrund",
        "{t.ein}, {t.clause}, vor {b} Hintergrund",
        "{t.ein} {t.verb}{t.rest} auf {b} Hintergrund",
        "{t.der} {t.verb}{t.rest} auf {b} Hintergrund",
        "auf {b} Hintergrund {t.verb} {t.ein}{t.rest}",
        "vor {b} Hintergrund {t.verb} {t.ein}{t.rest}",
        "{t.ein} {t.verb}{t.rest}",
        "{t.ein}, {t.clause}",
    ],
    2: [
        "{u.ein}, {u.clause}, über {v.einem}, {v.clause}, auf {b} Hintergrund",
        "{v.ein}, {v.clause}, unter {u.einem}, {u.clause}, auf {b} Hintergrund",
        "{u.ein}, {u.clause}, über {v.einem}, {v.clause}, vor {b} Hintergrund",
        "auf {b} Hintergrund {u.ein}, {u.clause}, über {v.einem}, {v.clause}",
        "auf {b} Hintergrund {v.ein}, {v.clause}, unter {u.einem}, {u.clause}",
        "{u.ein}, {u.clause}, über {v.einem}, {v.clause}",
    ],
}

# ---- Chinese -----------------------------------------------------------------------------------------------

ZH_SHAPE = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星"}
ZH_COLOUR = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "white": "白色",
}
ZH_BACKGROUND = {"black": "黑色", "gray": "灰色", "brown": "棕色", "navy": "深蓝色"}
ZH_VERB = {
    "moving left": "向左移动",
    "moving right": "向右移动",
    "moving up": "向上移动",
    "moving down": "向下移动",
    "standing still": "静止不动",
    "growing": "逐渐变大",
    "shrinking": "逐渐变小",
}


def _chinese(thing):
    colour, shape = ZH_COLOUR[thing.colour], ZH_SHAPE[thing.shape]
    return Phrases(of=f"一个{colour}的{shape}", plain=f"一个{colour}{shape}", verb=ZH_VERB[thing.motion])


CHINESE = {
    1: [
        "{b}背景上，{t.of}{t.verb}",
        "{b}背景上{t.plain}{t.verb}",
        "{t.of}在{b}背景上{t.verb}",
        "{t.of}{t.verb}，{b}背景",
        "在{b}背景上，{t.plain}{t.verb}",
        "{t.of}{t.verb}",
        "{t.plain}{t.verb}",
    ],
    2: [
        "{b}背景上，上面{u.of}{u.verb}，下面{v.of}{v.verb}",
        "{b}背景上，下面{v.of}{v.verb}，上面{u.of}{u.verb}",
        "上面{u.of}{u.verb}，下面{v.of}{v.verb}，{b}背景",
        "在{b}背景上，上方{u.plain}{u.verb}，下方{v.plain}{v.verb}",
        "上面{u.of}{u.verb}，下面{v.of}{v.verb}",
    ],
}

# ---- all of them -------------------------------------------------------------------------------------------

TEMPLATES = {"en": ENGLISH, "es": SPANISH, "de": GERMAN, "zh": CHINESE}
PHRASES = {"en": _english, "es": _spanish, "de": _german, "zh": _chinese}
BACKGROUND_WORDS = {  # in English they are called as everywhere in the code
    "en": dict(zip(ES_BACKGROUND, ES_BACKGROUND)),
    "es": ES_BACKGROUND,
    "de": DE_BACKGROUND,
    "zh": ZH_BACKGROUND,
}


def say(template, language, scene):
    """A sentence of TEMPLATES[language][number of things] about a scene."""
    things = [PHRASES[language](thing) for thing in scene.things]
    return template.format(
        t=things[0], u=things[0], v=things[-1], b=BACKGROUND_WORDS[language][scene.background]
    )


# One word of each motion carries its meaning ("left"); the words around it ("moving") are grammar.
MEANINGS = {
    "motion": {
        "moving left": "left izquierda links 向左",
        "moving right": "right derecha rechts 向右",
        "moving up": "up arriba oben 向上",
        "moving down": "down abajo unten 向下",
        "standing still": "still quieto quieta stillsteht 静止不动 静止",
        "growing": "growing grows creciendo crece wächst 逐渐变大 变大",
        "shrinking": "shrinking shrinks encogiéndose encoge schrumpft 逐渐变小 变小",
    },
    "order": {"above": "above top encima über 上面 上方", "below": "below bottom debajo unter 下面 下方"},
    "grammar": {
        "": "a an the is on with that and at background moving moves standing stands "
        "un una el la que de se mueve moviéndose está hacia sobre fondo "
        "ein eine einem der das sich nach bewegt steht auf vor hintergrund 一个 的 在 背景上 背景 移动",
    },
    "shape": {
        shape: f"{shape} {ES_SHAPE[shape]} {DE_SHAPE[shape][0].lower()} {ZH_SHAPE[shape]}"
        for shape in ES_SHAPE
    },
    "colour": {
        colour: " ".join(
            [colour, *ES_COLOUR[colour], ZH_COLOUR[colour]]
            + [DE_COLOUR[colour] + ending for ending in ("", "e", "er", "es", "en")]
        )
        for colour in ES_COLOUR
    },
}
LEXICON = {
    phrase: (kind, value)
    for kind, values in MEANINGS.items()
    for value, phrases in values.items()
    for phrase in phrases.split()
}
LEXICON |= {  # backgrounds, some of which are two words; German ones also without their ending
    phrase: ("background", name)
    for name, german in DE_BACKGROUND.items()
    for phrase in (name, ES_BACKGROUND[name], german, german.removesuffix("em"), ZH_BACKGROUND[name])
}
