"""What would somebody type who never read the tiny world's grammar?  Ten wishes in four languages."""

from moddiff.tiny.world import Scene, Thing

# (shape, colour, motion, background; None: not said), and the wish in English, Spanish, German, Chinese.
WISHES = [
    (
        ("circle", "red", "moving right", "black"),
        "picture a ripe tomato rolling to the right in the dark of the night",
        "imagina un tomate maduro que rueda a la derecha en plena noche oscura",
        "stell dir eine reife Tomate vor, die nachts im Dunkeln nach rechts rollt",
        "想象一个熟透的番茄，在漆黑的夜里朝右边滚过去",
    ),
    (
        ("star", "yellow", "standing still", "navy"),
        "the evening star hangs there without moving, golden, in a deep blue sky at night",
        "el lucero dorado no se mueve nada en el cielo azul oscuro de la noche",
        "der goldene Abendstern hängt reglos am tiefblauen Nachthimmel",
        "金色的星星一动不动地挂在深蓝的夜空里",
    ),
    (
        ("square", "green", "shrinking", "gray"),
        "a box as green as grass that gets smaller and smaller in front of a concrete wall",
        "una caja verde como la hierba que se hace cada vez más pequeña ante un muro de hormigón",
        "eine grasgrüne Kiste, die vor einer Betonwand immer kleiner wird",
        "水泥墙前面，一个草绿的方盒子越来越小",
    ),
    (
        ("triangle", "white", "moving up", None),
        "I would love to see a snowy mountain peak float up to the ceiling",
        "me gustaría ver la cima nevada de una montaña flotando hacia el techo",
        "ich möchte einen verschneiten Berggipfel sehen, der zur Decke schwebt",
        "我想看一座雪白的山峰往天花板飘上去",
    ),
    (
        ("circle", "orange", "growing", "brown"),
        "a basketball that swells like a balloon on a floor of dark wood",
        "un balón de baloncesto que se hincha como un globo en un suelo de madera oscura",
        "ein Basketball, der auf dunklem Holzboden anschwillt wie ein Ballon",
        "深色木地板上，一个篮球像气球一样鼓起来",
    ),
    (
        ("square", "blue", "moving left", "gray"),
        "a cube the colour of the sea slides to the left through thick fog",
        "un cubo del color del mar se desliza a la izquierda entre la niebla",
        "ein Würfel in der Farbe des Meeres gleitet durch dichten Nebel nach links",
        "浓雾里，一个海水颜色的方块滑到左边去",
    ),
    (
        ("circle", "yellow", "moving up", "black"),
        "the sun rises out of total darkness",
        "sale el sol desde la oscuridad total",
        "die Sonne geht aus völliger Finsternis auf",
        "太阳从一片漆黑中升起来",
    ),
    (
        ("triangle", "purple", "moving down", None),
        "a pyramid the colour of plums is falling",
        "cae una pirámide del color de las ciruelas",
        "eine pflaumenfarbene Pyramide fällt herunter",
        "一座葡萄颜色的金字塔掉下来了",
    ),
    (
        ("star", "red", "growing", "black"),
        "a crimson ornament with five points, and it becomes huge in the dark",
        "un adorno carmesí de cinco puntas que se vuelve enorme en la oscuridad",
        "ein blutroter Zacken mit fünf Spitzen wird im Finstern riesengroß",
        "黑暗中，一个五角的鲜红饰物变得巨大",
    ),
    (
        ("circle", "white", "moving down", "navy"),
        "a snowball drops through the deep blue night",
        "una bola de nieve cae en la noche azul profunda",
        "ein Schneeball fällt durch die tiefblaue Nacht",
        "一个雪球从深蓝的夜空里落下",
    ),
]

# [(language, prompt, Scene)], the languages in turn, so that the first n of them are spread over all four.
PROMPTS = [
    (language, words[i], Scene((Thing(shape, colour, motion),), background))
    for (shape, colour, motion, background), *words in WISHES
    for i, language in enumerate(("en", "es", "de", "zh"))
]
