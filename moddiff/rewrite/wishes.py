"""Which wishes, answered, does a small language model see before a new one?  In four languages.

None of these is a wish that the guide's figures are measured on, and no noun or colour of those is in them;
tests/test_rewrite.py looks.
"""

LANGUAGES = ("en", "es", "de", "zh")
# (shape, colour, motion, background), and the wish in English, Spanish, German, Chinese.
# The four backgrounds and shapes come four times each, motions and colours two or three times: what is shown
# more often would be answered more often. The first seven, which the instructions show, have all of them.
SHOWN = (
    (
        ("circle", "red", "moving down", "black"),
        "a cherry falls down at night",
        "una cereza cae por la noche",
        "eine Kirsche fällt nachts herab",
        "一颗樱桃在夜里掉下来",
    ),
    (
        ("triangle", "green", "growing", "brown"),
        "a leaf gets bigger on the soil",
        "una hoja crece en la tierra",
        "ein Blatt wird auf der Erde größer",
        "泥土上一片叶子在长大",
    ),
    (
        ("square", "white", "standing still", "gray"),
        "a handkerchief lies still on the road",
        "un pañuelo está quieto sobre el asfalto",
        "ein Taschentuch liegt still auf dem Asphalt",
        "柏油路上一块手帕静静地躺着",
    ),
    (
        ("circle", "orange", "moving left", "navy"),
        "a tangerine rolls to the left at dusk",
        "una mandarina rueda hacia la izquierda al anochecer",
        "eine Mandarine rollt in der Dämmerung nach links",
        "黄昏里一个橘子往左滚",
    ),
    (
        ("star", "yellow", "shrinking", "navy"),
        "a starfish like a lemon gets smaller at dusk",
        "una estrella de mar color limón se hace pequeña al anochecer",
        "ein zitronengelber Seestern wird in der Dämmerung kleiner",
        "黄昏里柠檬色的星形饼干变小了",
    ),
    (
        ("square", "blue", "moving up", "black"),
        "a turquoise tile goes up in the dark",
        "un azulejo turquesa sube en la oscuridad",
        "eine türkise Fliese steigt im Dunkeln auf",
        "黑暗中一块天蓝的瓷砖升上去",
    ),
    (
        ("triangle", "purple", "moving right", "brown"),
        "a violet tent goes to the right over the mud",
        "una tienda de campaña violeta va a la derecha por el barro",
        "ein violettes Zelt bewegt sich nach rechts durch den Schlamm",
        "泥地上紫色的帐篷往右走",
    ),
    (
        ("circle", "green", "standing still", "gray"),
        "a pea does not move on the pavement",
        "un guisante no se mueve sobre la acera",
        "eine Erbse bewegt sich nicht auf dem Pflaster",
        "人行道上一颗豌豆一动不动",
    ),
    (
        ("square", "red", "moving left", "brown"),
        "a brick slides to the left on clay",
        "un ladrillo se desliza a la izquierda sobre el barro",
        "ein Ziegel rutscht nach links über den Lehm",
        "一块砖在黏土上滑到左边",
    ),
    (
        ("triangle", "orange", "moving up", "gray"),
        "a traffic cone flies up out of the smoke",
        "un cono de tráfico vuela hacia arriba entre el humo",
        "ein Verkehrskegel fliegt aus dem Rauch nach oben",
        "烟里一个路锥飞上去",
    ),
    (
        ("star", "white", "growing", "black"),
        "a jasmine blossom grows and grows in the dark",
        "una flor de jazmín se hace grande en la oscuridad",
        "eine Jasminblüte wird im Dunkeln immer größer",
        "黑暗中一朵茉莉花越来越大",
    ),
    (
        ("circle", "blue", "shrinking", "brown"),
        "a blueberry shrinks on the ground",
        "un arándano se encoge en el suelo",
        "eine Blaubeere schrumpft auf dem Boden",
        "地上一颗蓝莓越来越小",
    ),
    (
        ("star", "red", "moving down", "navy"),
        "a poinsettia sinks in the evening",
        "una flor de pascua baja al atardecer",
        "ein Weihnachtsstern sinkt am Abend herab",
        "傍晚一片枫叶落下来",
    ),
    (
        ("square", "yellow", "moving right", "navy"),
        "a slice of cheese glides to the right in the evening",
        "una loncha de queso va hacia la derecha al atardecer",
        "eine Scheibe Käse gleitet abends nach rechts",
        "傍晚一片奶酪往右边滑",
    ),
    (
        ("triangle", "white", "shrinking", "gray"),
        "a sail gets smaller and smaller under the clouds",
        "una vela se hace cada vez más pequeña bajo las nubes",
        "ein Segel wird unter den Wolken immer kleiner",
        "乌云下一张帆越来越小",
    ),
    (
        ("star", "purple", "standing still", "black"),
        "an iris stands motionless in the dark",
        "una flor de iris está inmóvil en la oscuridad",
        "eine Schwertlilie steht reglos im Dunkeln",
        "黑暗中一朵鸢尾花静止不动",
    ),
)

# Wishes on which ways of asking were compared; half of them are examples too, half make the averages.
USUAL = (
    (
        ("circle", "green", "moving left", "black"),
        "a lime trundles away to the left in a pitch-black cellar",
        "una lima rueda hacia la izquierda en un sótano negrísimo",
        "eine Limette kullert im stockdunklen Keller nach links",
        "漆黑的地下室里，一颗青柠往左边滚走了",
    ),
    (
        ("square", "white", "moving down", "gray"),
        "a lump of sugar sinks past rain clouds",
        "un terrón de azúcar baja entre nubes de lluvia",
        "ein Stück Zucker sinkt an Regenwolken vorbei",
        "一块方糖从雨云旁边往下沉",
    ),
    (
        ("triangle", "orange", "standing still", "gray"),
        "a wedge of pumpkin does not budge on the tarmac",
        "una cuña de calabaza no se mueve del asfalto",
        "ein Keil aus Kürbis rührt sich nicht vom Asphalt",
        "一块三角的南瓜待在柏油路上不动",
    ),
    (
        ("star", "white", "moving right", "navy"),
        "an edelweiss drifts to the right after dusk",
        "una flor de edelweiss flota hacia la derecha tras el anochecer",
        "ein Edelweiß treibt am späten Abend nach rechts",
        "傍晚一朵栀子花往右飘",
    ),
    (
        ("circle", "blue", "shrinking", "brown"),
        "a marble of sapphire becomes tiny on the garden soil",
        "una canica de zafiro se vuelve diminuta en la tierra del jardín",
        "eine Murmel aus Saphir wird auf der Gartenerde winzig",
        "花园泥土上，一颗蓝宝石弹珠变得很小很小",
    ),
    (
        ("square", "red", "moving up", "navy"),
        "a scarlet envelope is lifted into the dusk",
        "un sobre escarlata se eleva al anochecer",
        "ein scharlachroter Briefumschlag wird in der Dämmerung emporgehoben",
        "黄昏时一个红包升了起来",
    ),
    (
        ("triangle", "green", "growing", "brown"),
        "a fir tree gets taller and taller on bare earth",
        "un abeto se hace cada vez más alto en la tierra desnuda",
        "eine Tanne wird auf nackter Erde immer höher",
        "光秃秃的土地上，一棵松树越长越高",
    ),
    (
        ("star", "yellow", "moving down", "black"),
        "a sheriff's badge made of brass drops into a black hole",
        "una placa de sheriff de latón cae en un agujero negro",
        "ein Sheriffstern aus Messing fällt in ein schwarzes Loch",
        "一枚黄铜警徽掉进黑洞里",
    ),
    (
        ("circle", "purple", "moving up", "gray"),
        "a soap bubble the colour of lavender ascends over the asphalt",
        "una pompa de jabón color lavanda asciende sobre el asfalto",
        "eine lavendelfarbene Seifenblase steigt über dem Asphalt auf",
        "柏油路上，一个薰衣草颜色的肥皂泡升起来",
    ),
    (
        ("square", "yellow", "moving right", "brown"),
        "a slab of butter slips to the right on chocolate",
        "un trozo de mantequilla resbala hacia la derecha sobre chocolate",
        "ein Stück Butter rutscht auf Schokolade nach rechts",
        "一块黄油在巧克力上往右滑",
    ),
    (
        ("triangle", "red", "shrinking", "black"),
        "a slice of watermelon becomes less and less, with the lights off",
        "una rodaja de sandía mengua con las luces apagadas",
        "eine Scheibe Wassermelone wird bei ausgeschaltetem Licht immer weniger",
        "关了灯，一片西瓜越来越小",
    ),
    (
        ("star", "purple", "standing still", "navy"),
        "an orchid rests motionless as evening comes",
        "una orquídea reposa inmóvil cuando llega la noche",
        "eine Orchidee ruht unbewegt, während es Abend wird",
        "天快黑了，一朵兰花静静地不动",
    ),
    (
        ("circle", "white", "growing", "gray"),
        "a ping-pong ball puffs up in the drizzle",
        "una pelota de ping-pong se infla bajo la llovizna",
        "ein Tischtennisball bläht sich im Nieselregen auf",
        "毛毛雨里，一个乒乓球胀大了",
    ),
    (
        ("square", "orange", "moving left", "black"),
        "a parcel the colour of carrots scoots left in the unlit hall",
        "un paquete del color de las zanahorias se va a la izquierda en la sala sin luz",
        "ein karottenfarbenes Paket huscht im unbeleuchteten Saal nach links",
        "没有灯的大厅里，一个胡萝卜颜色的包裹往左移",
    ),
)
