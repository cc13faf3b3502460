"""How is a scene said? The vocabulary and sentence templates of the tiny world in English, Spanish, German and Chinese.

`TEMPLATES[language][things]` lists functions (thing..., background) -> caption, the canonical form first.
`LEXICON` maps every phrase that a template can produce to its meaning: (kind, value), where kind "grammar"
carries none of its own.
"""

LANGUAGES = ("en", "es", "de", "zh")

# ---- English
# ------------------------------------------------------------------------------------------------------------
EN_VERB = {
    "moving left": "moves left",
    "moving right": "moves right",
    "moving up": "moves up",
    "moving down": "moves down",
    "standing still": "stands still",
    "growing": "grows",
    "shrinking": "shrinks",
}


def _en(t):
    return f"{'an' if t.colour == 'orange' else 'a'} {t.colour} {t.shape}"


def _en_the(t):
    return f"the {t.colour} {t.shape}"


ENGLISH_ONE = [
    lambda t, b: f"{_en(t)} {t.motion} on a {b} background",
    lambda t, b: f"{_en(t)} {EN_VERB[t.motion]} on a {b} background",
    lambda t, b: f"{_en(t)} {EN_VERB[t.motion]} on {b}",
    lambda t, b: f"{_en(t)} {t.motion} on {b}",
    lambda t, b: f"{_en(t)} is {t.motion} on a {b} background",
    lambda t, b: f"{_en_the(t)} is {t.motion} on a {b} background",
    lambda t, b: f"on a {b} background, {_en(t)} {EN_VERB[t.motion]}",
    lambda t, b: f"on a {b} background {_en(t)} is {t.motion}",
    lambda t, b: f"a {b} background with {_en(t)} {t.motion}",
    lambda t, b: f"{t.colour} {t.shape} {t.motion}, {b} background",
    lambda t, b: f"{_en(t)} {EN_VERB[t.motion]}",
    lambda t, b: f"{_en(t)} {t.motion}",
    lambda t, b: f"{_en_the(t)} is {t.motion}",
]
ENGLISH_TWO = [
    lambda u, v, b: f"{_en(u)} {u.motion} above {_en(v)} {v.motion} on a {b} background",
    lambda u, v, b: f"{_en(v)} {v.motion} below {_en(u)} {u.motion} on a {b} background",
    lambda u, v, b: (
        f"{_en(u)} {EN_VERB[u.motion]} above {_en(v)} that {EN_VERB[v.motion]} on a {b} background"
    ),
    lambda u, v, b: (
        f"{_en(v)} {EN_VERB[v.motion]} below {_en(u)} that {EN_VERB[u.motion]} on a {b} background"
    ),
    lambda u, v, b: f"on a {b} background, {_en(u)} {u.motion} above {_en(v)} {v.motion}",
    lambda u, v, b: f"on a {b} background, {_en(v)} {v.motion} below {_en(u)} {u.motion}",
    lambda u, v, b: (
        f"{_en(u)} {u.motion} at the top and {_en(v)} {v.motion} at the bottom, on a {b} background"
    ),
    lambda u, v, b: f"{_en_the(u)} is {u.motion} above {_en_the(v)} {v.motion} on {b}",
    lambda u, v, b: f"{_en(u)} {u.motion} above {_en(v)} {v.motion} on {b}",
    lambda u, v, b: f"{_en(u)} {u.motion} above {_en(v)} {v.motion}",
    lambda u, v, b: f"{_en(v)} {v.motion} below {_en(u)} {u.motion}",
]

# ---- Spanish
# ------------------------------------------------------------------------------------------------------------
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
ES_WHERE = {
    "moving left": "hacia la izquierda",
    "moving right": "hacia la derecha",
    "moving up": "hacia arriba",
    "moving down": "hacia abajo",
}


def _es(t, articles=("un", "una")):
    feminine = t.shape == "star"
    return f"{articles[feminine]} {ES_SHAPE[t.shape]} {ES_COLOUR[t.colour][feminine]}"


def _es_the(t):
    return _es(t, ("el", "la"))


def _es_ing(t):
    if t.motion in ES_WHERE:
        return f"moviéndose {ES_WHERE[t.motion]}"
    return {"standing still": _es_still(t), "growing": "creciendo", "shrinking": "encogiéndose"}[t.motion]


def _es_verb(t):
    if t.motion in ES_WHERE:
        return f"se mueve {ES_WHERE[t.motion]}"
    return {"standing still": f"está {_es_still(t)}", "growing": "crece", "shrinking": "se encoge"}[t.motion]


def _es_still(t):
    return "quieta" if t.shape == "star" else "quieto"


def _es_on(b):
    return f"sobre un fondo {ES_BACKGROUND[b]}"


SPANISH_ONE = [
    lambda t, b: f"{_es(t)} {_es_ing(t)} {_es_on(b)}",
    lambda t, b: f"{_es(t)} {_es_verb(t)} {_es_on(b)}",
    lambda t, b: f"{_es(t)} que {_es_verb(t)} {_es_on(b)}",
    lambda t, b: f"{_es_the(t)} {_es_verb(t)} {_es_on(b)}",
    lambda t, b: f"{_es_on(b)}, {_es(t)} {_es_verb(t)}",
    lambda t, b: f"{_es(t)} {_es_ing(t)}, fondo {ES_BACKGROUND[b]}",
    lambda t, b: f"{_es(t)} {_es_ing(t)}",
    lambda t, b: f"{_es(t)} {_es_verb(t)}",
]
SPANISH_TWO = [
    lambda u, v, b: f"{_es(u)} {_es_ing(u)} encima de {_es(v)} {_es_ing(v)} {_es_on(b)}",
    lambda u, v, b: f"{_es(v)} {_es_ing(v)} debajo de {_es(u)} {_es_ing(u)} {_es_on(b)}",
    lambda u, v, b: f"{_es(u)} que {_es_verb(u)} encima de {_es(v)} que {_es_verb(v)} {_es_on(b)}",
    lambda u, v, b: f"{_es_on(b)}, {_es(u)} {_es_ing(u)} encima de {_es(v)} {_es_ing(v)}",
    lambda u, v, b: f"{_es_on(b)}, {_es(v)} {_es_ing(v)} debajo de {_es(u)} {_es_ing(u)}",
    lambda u, v, b: f"{_es(u)} {_es_ing(u)} encima de {_es(v)} {_es_ing(v)}",
]

# ---- German ------------------------------------------------------------------------------------------------
# -------------
DE_SHAPE = {
    "circle": ("Kreis", "m"),
    "square": ("Quadrat", "n"),
    "triangle": ("Dreieck", "n"),
    "star": ("Stern", "m"),
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
DE_BACKGROUND = {"black": "schwarzem", "gray": "grauem", "brown": "braunem", "navy": "marineblauem"}
DE_VERB = {
    "moving left": ("bewegt sich", "nach links"),
    "moving right": ("bewegt sich", "nach rechts"),
    "moving up": ("bewegt sich", "nach oben"),
    "moving down": ("bewegt sich", "nach unten"),
    "standing still": ("steht", "still"),
    "growing": ("wächst", ""),
    "shrinking": ("schrumpft", ""),
}
DE_CLAUSE = {
    "moving left": "sich nach links bewegt",
    "moving right": "sich nach rechts bewegt",
    "moving up": "sich nach oben bewegt",
    "moving down": "sich nach unten bewegt",
    "standing still": "stillsteht",
    "growing": "wächst",
    "shrinking": "schrumpft",
}


def _de(t):
    noun, gender = DE_SHAPE[t.shape]
    return f"ein {DE_COLOUR[t.colour]}{'er' if gender == 'm' else 'es'} {noun}"


def _de_the(t):
    noun, gender = DE_SHAPE[t.shape]
    return f"{'der' if gender == 'm' else 'das'} {DE_COLOUR[t.colour]}e {noun}"


def _de_dative(t):
    return f"einem {DE_COLOUR[t.colour]}en {DE_SHAPE[t.shape][0]}"


def _de_that(t):
    return f"{'der' if DE_SHAPE[t.shape][1] == 'm' else 'das'} {DE_CLAUSE[t.motion]}"


def _de_does(t, subject):
    return f"{subject} {' '.join(DE_VERB[t.motion])}".strip()


def _de_asked(t, subject):
    verb, rest = DE_VERB[t.motion]
    return f"{verb} {subject} {rest}".strip()


def _de_on(b, word="auf"):
    return f"{word} {DE_BACKGROUND[b]} Hintergrund"


GERMAN_ONE = [
    lambda t, b: f"{_de(t)}, {_de_that(t)}, {_de_on(b)}",
    lambda t, b: f"{_de(t)}, {_de_that(t)}, {_de_on(b, 'vor')}",
    lambda t, b: f"{_de_does(t, _de(t))} {_de_on(b)}",
    lambda t, b: f"{_de_does(t, _de_the(t))} {_de_on(b)}",
    lambda t, b: f"{_de_on(b)} {_de_asked(t, _de(t))}",
    lambda t, b: f"{_de_on(b, 'vor')} {_de_asked(t, _de(t))}",
    lambda t, b: f"{_de_does(t, _de(t))}",
    lambda t, b: f"{_de(t)}, {_de_that(t)}",
]
GERMAN_TWO = [
    lambda u, v, b: f"{_de(u)}, {_de_that(u)}, über {_de_dative(v)}, {_de_that(v)}, {_de_on(b)}",
    lambda u, v, b: f"{_de(v)}, {_de_that(v)}, unter {_de_dative(u)}, {_de_that(u)}, {_de_on(b)}",
    lambda u, v, b: f"{_de(u)}, {_de_that(u)}, über {_de_dative(v)}, {_de_that(v)}, {_de_on(b, 'vor')}",
    lambda u, v, b: f"{_de_on(b)} {_de(u)}, {_de_that(u)}, über {_de_dative(v)}, {_de_that(v)}",
    lambda u, v, b: f"{_de_on(b)} {_de(v)}, {_de_that(v)}, unter {_de_dative(u)}, {_de_that(u)}",
    lambda u, v, b: f"{_de(u)}, {_de_that(u)}, über {_de_dative(v)}, {_de_that(v)}",
]

# ---- Chinese
# ------------------------------------------------------------------------------------------------------------
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


def _zh(t, of="的"):
    return f"一个{ZH_COLOUR[t.colour]}{of}{ZH_SHAPE[t.shape]}"


def _zh_does(t, of="的"):
    return _zh(t, of) + ZH_VERB[t.motion]


def _zh_on(b):
    return f"{ZH_BACKGROUND[b]}背景上"


CHINESE_ONE = [
    lambda t, b: f"{_zh_on(b)}，{_zh_does(t)}",
    lambda t, b: f"{_zh_on(b)}{_zh_does(t, '')}",
    lambda t, b: f"{_zh(t)}在{_zh_on(b)}{ZH_VERB[t.motion]}",
    lambda t, b: f"{_zh_does(t)}，{ZH_BACKGROUND[b]}背景",
    lambda t, b: f"在{_zh_on(b)}，{_zh_does(t, '')}",
    lambda t, b: _zh_does(t),
    lambda t, b: _zh_does(t, ""),
]
CHINESE_TWO = [
    lambda u, v, b: f"{_zh_on(b)}，上面{_zh_does(u)}，下面{_zh_does(v)}",
    lambda u, v, b: f"{_zh_on(b)}，下面{_zh_does(v)}，上面{_zh_does(u)}",
    lambda u, v, b: f"上面{_zh_does(u)}，下面{_zh_does(v)}，{ZH_BACKGROUND[b]}背景",
    lambda u, v, b: f"在{_zh_on(b)}，上方{_zh_does(u, '')}，下方{_zh_does(v, '')}",
    lambda u, v, b: f"上面{_zh_does(u)}，下面{_zh_does(v)}",
]

TEMPLATES = {
    "en": {1: ENGLISH_ONE, 2: ENGLISH_TWO},
    "es": {1: SPANISH_ONE, 2: SPANISH_TWO},
    "de": {1: GERMAN_ONE, 2: GERMAN_TWO},
    "zh": {1: CHINESE_ONE, 2: CHINESE_TWO},
}


def _lexicon():
    """One word of each motion carries its meaning ("left"); the words around it ("moving") are grammar."""
    told = {
        "motion": {
            "moving left": "left izquierda links 向左",
            "moving right": "right derecha rechts 向右",
            "moving up": "up arriba oben 向上",
            "moving down": "down abajo unten 向下",
            "standing still": "still quieto quieta stillsteht 静止不动 静止",
            "growing": "growing grows creciendo crece wächst 逐渐变大 变大",
            "shrinking": "shrinking shrinks encogiéndose encoge schrumpft 逐渐变小 变小",
        },
        "place": {"above": "above top encima über 上面 上方", "below": "below bottom debajo unter 下面 下方"},
        "grammar": {
            "": "a an the is on with that and at background moving moves standing stands un una el la que de se mueve moviéndose está hacia sobre fondo "
            "ein eine einem der das sich nach bewegt steht auf vor hintergrund 一个 的 在 背景上 背景 移动",
        },
    }
    table = {
        phrase: (kind, value)
        for kind, values in told.items()
        for value, phrases in values.items()
        for phrase in phrases.split()
    }
    for shape in ES_SHAPE:
        table |= dict.fromkeys(
            (shape, ES_SHAPE[shape], DE_SHAPE[shape][0].lower(), ZH_SHAPE[shape]), ("shape", shape)
        )
    for colour in ES_COLOUR:
        german = [DE_COLOUR[colour] + ending for ending in ("", "e", "er", "es", "en")]
        table |= dict.fromkeys((colour, *ES_COLOUR[colour], *german, ZH_COLOUR[colour]), ("colour", colour))
    for name in ES_BACKGROUND:
        table |= dict.fromkeys(
            (name, ES_BACKGROUND[name], DE_BACKGROUND[name], DE_BACKGROUND[name][:-2], ZH_BACKGROUND[name]),
            ("background", name),
        )
    return table


LEXICON = _lexicon()
