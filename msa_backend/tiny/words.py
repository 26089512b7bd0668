"""The words a tiny model can say. Common ones, so that ordinary English prompts become few tokens."""

WORDS: tuple[str, ...] = tuple(
    """
    a able about above across act add after again against age ago agree air all allow almost alone along already
    also although always am among an and animal another answer any anyone anything appear apple are area arm army
    around arrive art as ask at autumn away baby back bad bag ball bank base be bear beat beautiful because become bed
    been before began begin behind being believe bell below beneath best better between beyond big bird bit black
    block blood blow blue board boat body bone book born both bottom bowl box boy branch bread break breath bridge
    bright bring broken brother brown build burn business but buy by cake call came camp can cannot car card care
    carry case castle cat catch cause cell center century certain chair chance change check child children choose
    church circle city class clean clear climb clock close cloth cloud coast coat cold color come common company
    complete computer condition consider continue control cook cool copper corn corner correct cost could count
    country course cover cow create cross crowd cry cup current cut dance danger dark data daughter day dead deal
    dear death decide deep degree desert design desk develop did die differ difficult dinner direct discover distance
    divide do doctor does dog dollar done door double doubt down draw dream dress drink drive drop dry during dust
    each ear early earth ease east easy eat edge egg eight either electric else empty end enemy energy engine enjoy
    enough enter equal even evening event ever every everyone evidence exact example except excite exercise expect
    explain eye face fact fall family famous far farm fast father fear feed feel feet fell felt few field fig fight
    figure fill final find fine finger finish fire first fish fit five flat floor flow flower fly follow food foot for
    force forest forget form forward found four fox free fresh friend from front fruit full fun game garden gas gate
    gather gave general gentle get gift girl give glad glass go gold gone good got govern grand grass gray great green
    grew ground group grow guess guide had hair half hall hand happen happy hard has hat have he head hear heart heat
    heavy held help her here high hill him his history hit hold hole home hope horse hot hotel hour house how however
    huge human hundred hunt hurry husband ice idea if imagine important in inch include increase indeed industry
    inside instead interest into iron is island it its itself job join joy judge jump just keep kept key kind king
    kitchen knew know lady lake lamp land language large last late laugh law lay lead learn least leather leave led
    left leg lesson let letter level lie life lift light like line lion list listen little live local long look lord
    lose lost lot loud love low luck machine made magic main make man many map mark market marry master matter may me
    mean measure meat meet memory men mention metal method middle might mile milk million mind mine minute mirror miss
    model modern moment money month moon more morning most mother motion mountain mouth move much music must my name
    nation nature near necessary neck need neighbor neither never new news next nice night nine no noise none nor
    north nose not note nothing notice now number object observe ocean of off offer office often oil old on once one
    only open or orange order other our out outside over own page paint pair palace paper parent park part party pass
    past path pattern pay peace pen people pepper perhaps period person picture piece pipe place plain plan plane
    planet plant play please plenty pocket poem point poor position possible pound power practice prepare present
    president press pretty price prince problem process produce promise proof proper protect proud prove public pull
    purpose push put queen question quick quiet quite race radio rain raise ran reach read ready real reason receive
    record red remain remember repeat reply report rest result return rice rich ride right ring rise river road rock
    roll roof room root rope rose round row rule run sad safe said sail salt same sand sat save saw say scale school
    science score sea search season seat second secret see seed seem seen select sell send sense sent sentence
    separate serve set settle seven several shade shadow shape share sharp she ship shoe shop shore short should
    shoulder shout show side sign silence silver similar simple since sing sister sit six size skill skin sky sleep
    slip slow small smell smile smoke smooth snow so soft soil soldier solve some son song soon sort sound soup south
    space speak special speech speed spell spend spoke spoon spot spread spring square stand star start state station
    stay steel step stick still stone stood stop store storm story straight strange stream street strong student study
    subject such sudden sugar suggest suit summer sun supper supply sure surface surprise sweet swim table tail take
    talk tall taste taught teach team tell ten tent than thank that the their them then there these they thick thin
    thing think third this those though thought thousand thread three through throw thus tie time tiny to today
    together told tomorrow tone too took tool top total touch toward town trade train travel tree triangle trip
    trouble truck true trust try turn twelve twenty two type uncle under understand unit until up upon us use usual
    valley value various very view village visit voice vowel wait walk wall want war warm was wash watch water wave
    way we wear weather week weight well went were west what wheel when where whether which while white who whole
    whose why wide wife wild will win wind window wing winter wire wise wish with within without woman wonder wood
    word work world would write wrong yard year yellow yes yet you young your
    """.split()  # noqa: SIM905
)
