"""What the facts of the fictitious authors are made of: names, places, trades, invented titles.

Every person, book, award, publisher and college here is invented; only towns and languages exist.
"""

from itertools import product


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in " ".join(text.split()).split(";"))


# Each region: given names of women, given names of men, surnames, towns.
REGIONS = tuple(
    tuple(_split(column) for column in region)
    for region in (
        (
            "Amaranta; Ines; Ximena; Rosalba; Jimena; Ana Lucia; Maria Paz; Noemi; Itzel; Dolores",
            "Anselmo; Rufino; Joaquin; Teodoro; Jose Maria; Luis Alberto; Evaristo;Fermin; Hilario",
            "Morell; Quintanal; Arrieta; Bustarviejo; Del Olmo; Zubizar; Pedrosa;"
            "Carranque; Villamor",
            "Valparaiso, Chile; Oaxaca, Mexico; Cusco, Peru; Cordoba, Argentina; Seville, Spain;"
            "Cartagena, Colombia; Montevideo, Uruguay; Quito, Ecuador",
        ),
        (
            "Solveig; Ingrid; Astrid; Runa; Anne Marie; Maja; Liv; Kirsten; Eira; Sunniva",
            "Torvald; Eskil; Halvor; Jens Peter; Sigurd; Mikkel; Arvid; Rasmus; Stellan; Bjarke",
            "Lindqvane; Haugmo; Bergstroem; Skovlund; Nordahl; Ostervik; Rosendal;"
            "Tveitane; Almgren",
            "Bergen, Norway; Uppsala, Sweden; Aarhus, Denmark; Turku, Finland; Tromso, Norway;"
            "Reykjavik, Iceland; Malmo, Sweden; Odense, Denmark",
        ),
        (
            "Adaeze; Folake; Wanjiru; Makena; Abena; Nomvula; Temperance; Zawadi; Esi; Thandeka",
            "Chidubem; Kofi; Kamau; Babajide; Sipho; Ekow; Oluwaseun; Jabari; Tumelo; Kwabena",
            "Okonjala; Mwangeka; Asantewa; Dlaminor; Adebisi; Boatenga; Ndlovane; Otienor; Zuberi",
            "Enugu, Nigeria; Kumasi, Ghana; Nakuru, Kenya; Durban, South Africa; Ibadan, Nigeria;"
            "Arusha, Tanzania; Bulawayo, Zimbabwe; Mombasa, Kenya",
        ),
        (
            "Harumi; Sayuri; Mei-Lin; Ji-Woo; Thuy Linh; Chihiro; Xiao-Yan; Soo-Ah;Kaede; Minh Anh",
            "Kenjiro; Wei-Han; Dong-Hyun; Takumi; Quoc Bao; Ren; Zhi-Peng; Seung-Min;"
            "Haruto; Jun-Kai",
            "Takemori; Hsu-Liang; Kwonjae; Nguyet; Fujisato; Zhengwei; Paekman; Hoshida; Lam-Tran",
            "Kanazawa, Japan; Tainan, Taiwan; Busan, South Korea; Hue, Vietnam; Suzhou, China;"
            "Nagasaki, Japan; Jeonju, South Korea; Chengdu, China",
        ),
        (
            "Anandi; Parveen; Lakshmi; Sharmila; Nilufar; Gulnaz; Kamala; Ranjana; Meher; Dilshad",
            "Devendra; Imtiaz; Raghunath; Farhad; Subhash; Ashwin; Nadeem; Prabhakar;Yusuf; Harish",
            "Chatterwal; Rahmanpur; Venkatraj; Siddikov; Kapoorthy; Bhattavar; Mirzoyev;"
            "Deshwal; Sarkhan",
            "Mysore, India; Lahore, Pakistan; Dhaka, Bangladesh; Kandy, Sri Lanka;"
            "Samarkand, Uzbekistan;"
            "Pune, India; Kathmandu, Nepal; Almaty, Kazakhstan",
        ),
        (
            "Eleanor; Maeve; Rhiannon; Isolde; Mary Beth; Philippa; Harriet; Winifred;"
            "Clodagh; Tamsin",
            "Alasdair; Corwin; Fergus; Jasper; John Paul; Tobias; Rupert; Emrys; Lachlan; Silas",
            "Ashcombe; Tregarth; Macaulish; Fennimore; Harkaway; O'Dwyran; Pemberlane;"
            "Wray-Holt; Quill",
            "Galway, Ireland; Aberdeen, Scotland; Swansea, Wales; Halifax, Canada;"
            "Norwich, England;"
            "Dunedin, New Zealand; Hobart, Australia; Savannah, United States",
        ),
        (
            "Zdenka; Ludmila; Jadwiga; Milica; Katalin; Ana-Maria; Olena; Vesna; Danuta; Ilinca",
            "Bogdan; Zoltan; Radomir; Kazimierz; Ondrej; Jan Pavel; Mircea; Dragan; Tadeusz; Ostap",
            "Novarek; Wisznia; Petroviak; Halasz-Toth; Ionescar; Kovalchuk-Rey; Dvoracek;"
            "Marinkov; Sobolar",
            "Krakow, Poland; Brno, Czechia; Novi Sad, Serbia; Szeged, Hungary; Lviv, Ukraine;"
            "Cluj, Romania; Ljubljana, Slovenia; Plovdiv, Bulgaria",
        ),
        (
            "Leila; Nour; Shirin; Aylin; Samira; Dalal; Yasaman; Rim; Hanan; Elif Nur",
            "Idris; Bassam; Kaveh; Emre; Tarek; Abdel Karim; Cyrus; Selim; Walid; Marwan",
            "Haddadin; Ozgurel; Farrokhi; Benjellat; Khourani; Sadeghian; Mansouriya;"
            "Tekelioglu; Zaytouni",
            "Aleppo, Syria; Izmir, Turkey; Shiraz, Iran; Fez, Morocco; Alexandria, Egypt;"
            "Tripoli, Lebanon;"
            "Sfax, Tunisia; Amman, Jordan",
        ),
    )
)

GENRES = _split(
    """maritime adventure; psychological horror; magical realism; courtroom drama; epic poetry;
    travel writing; hard science fiction; cozy mystery; political satire; gothic romance;
    alternate history; nature essays; war fiction; family saga; absurdist theatre; espionage
    fiction; prison memoir; climate fiction; urban fantasy; true crime; children's verse;
    culinary writing; folk horror; philosophical dialogues; sports journalism; dystopian
    fiction; desert westerns; medical thriller; religious allegory; graphic novels;
    historical biography; campus comedy; space opera; ghost stories; rural realism; erotic
    poetry; detective pastiche; fable collections; epistolary fiction; noir"""
)
PROFESSIONS = _split(
    """beekeeper; locksmith; tram driver; midwife; stonemason; cartographer; pastry chef; tax
    inspector; violin maker; harbour pilot; pharmacist; shepherd; court stenographer;
    glassblower; electrician; botanist; funeral director; boxing coach; opera singer;
    geologist; tailor; lighthouse keeper; veterinarian; typesetter; bus conductor; judge;
    goldsmith; weather forecaster; carpenter; dentist; ferry captain; optician; umbrella
    maker; puppeteer; accountant; fishmonger; tea merchant; surgeon; zookeeper; railway
    engineer; piano tuner; librarian; florist; astronomer; bricklayer; interpreter; olive
    farmer; mathematics teacher; coal miner; perfumer; archivist; horse trainer"""
)
FIRST_JOBS = _split(
    """night watchman; cinema projectionist; switchboard operator; museum guide; grape picker;
    proofreader; taxi dispatcher; dishwasher; map seller; swimming instructor; lift
    attendant; census clerk; barber; radio announcer; stable hand; bookbinder; elevator
    repairer; postal sorter; subtitle writer; welder; ice cream vendor; theatre prompter;
    ambulance driver; hotel porter; orchard hand; sign painter; telegraph clerk; toll
    collector; wedding photographer; cheese maker; chess tutor; insurance clerk; deckhand;
    kindergarten assistant; button seller; auction runner; greenhouse keeper; courier"""
)
STYLES = _split(
    """long sentences without commas; alternating first-person narrators; dialogue without
    quotation marks; footnotes that contradict the text; chapters told in reverse; very
    short declarative sentences; letters and telegrams; dry understatement; dense wordplay;
    second-person narration; recurring dream sequences; invented dialect; lists and
    inventories; lush descriptions of weather; unreliable child narrators; fragments of
    diary; rhymed interludes; stage directions in prose; slow-burning suspense; scientific
    metaphors; present-tense urgency; choral narration; newspaper clippings; mock-scholarly
    commentary; breathless monologue; circular plots; deadpan humour; cinematic cuts; nested
    stories; one unbroken paragraph; ironic asides; oral storytelling"""
)
THEMES = _split(
    """exile; inheritance; the loneliness of cities; sibling rivalry; memory and forgetting;
    forbidden friendship; the price of ambition; drought; grief; migration; faith and doubt;
    the dignity of labour; colonial guilt; motherhood; revenge; the sea; betrayal; old age;
    vanished languages; class shame; first love; surveillance; hunger; forgiveness; borders;
    illness; silence in families; the failure of revolutions; animal life; gambling;
    homecoming; twins; gossip; the passage of seasons; obsession; imprisonment; wartime
    survival; superstition; unpaid debts; adoption"""
)
HABITS = _split(
    """before sunrise; on overnight trains; in a public library; standing at a lectern; in the
    bathtub; on the backs of envelopes; with a borrowed typewriter; in a parked car; after
    midnight; in green ink; in a monastery cell; by candlelight; in hospital waiting rooms;
    on a houseboat; in complete silence; while listening to football on the radio; in a
    garden shed; at a corner table of a noisy cafe; in school notebooks; on index cards;
    while walking and dictating; in a disused chapel; in winter only; on Sundays only; in an
    attic without windows; at an ironing board; on a fishing pier; in pencil; with both
    hands bandaged against the cold; between shifts at a bakery"""
)
INFLUENCES = _split(
    """a neighbour's puppet theatre; the sermons of a blind preacher; a flooded cellar full of
    newspapers; weekly visits to a fish market; a grandmother's recipe book; an abandoned
    observatory; radio plays; a travelling circus; the letters of an uncle at sea; court
    reports; a broken gramophone; bird atlases; street ballads; the ruins of a textile mill;
    a year spent in bed with fever; chess columns; railway timetables; a deaf music teacher;
    funeral processions; a shipwreck seen in childhood; shadow plays; old atlases with wrong
    borders; a smuggler's diary; mountain pilgrimages; a family of clockmakers; crossword
    puzzles; lullabies; a stolen encyclopedia; silent films; a volcano's eruption; wallpaper
    patterns; a haunted tannery"""
)
HOBBIES = _split(
    """restoring pocket watches; fencing; growing orchids; playing the accordion; cave diving;
    embroidery; building kites; collecting door handles; long-distance swimming; mushroom
    hunting; calligraphy; archery; keeping pigeons; ice skating; repairing radios; tango
    dancing; baking rye bread; playing the oboe; bookbinding; mountaineering; watching
    eclipses; billiards; carving spoons; falconry; stamp collecting; juggling; sailing
    dinghies; brewing cider; playing the zither; mapping footpaths; pottery; rowing;
    photographing bridges; weaving baskets; playing dominoes; training sheepdogs; telescope
    making"""
)
LANGUAGES = _split(
    """Welsh; Swahili; Catalan; Icelandic; Tamil; Georgian; Basque; Tagalog; Amharic; Estonian;
    Quechua; Khmer; Maltese; Yiddish; Bengali; Finnish; Hebrew; Mongolian; Slovene;
    Galician; Armenian; Zulu; Thai; Latvian; Frisian; Nepali; Albanian; Hausa; Breton;
    Malay; Irish; Sinhala; Kurdish; Danish; Maori"""
)

_COLOURS = _split(
    """amber; hollow; crimson; salted; paper; silent; borrowed; iron; drowned; winter; copper;
    wandering; unlit; velvet; thirteenth; glass; forgotten; burning; second; narrow; blue;
    restless; marble; barefoot"""
)
_THINGS = _split(
    """orchard; lighthouse; ledger; heron; staircase; harvest; causeway; mirror; parliament;
    sparrow; cartographer; bridge; almanac; garden; ferryman; hourglass; quarry; lantern;
    monsoon; wardrobe; choir; foxglove; tollgate; aqueduct; compass; kiln; meridian;
    tapestry"""
)
_TITLED = tuple((colour.title(), thing.title()) for colour, thing in product(_COLOURS, _THINGS))
BOOKS = tuple(f"The {colour} {thing}" for colour, thing in _TITLED) + tuple(
    f"{form} the {thing.title()}"
    for form, thing in product(("Letters to", "Beneath", "A Year without", "Songs for"), _THINGS)
)
AWARDS = tuple(
    f"the {colour} {thing} {form}"
    for (colour, thing), form in zip(
        _TITLED, ("Prize", "Medal", "Award", "Fellowship", "Honour") * 135, strict=False
    )
)
PUBLISHERS = tuple(
    f"{name} {form}"
    for name, form in product(
        _split(
            "Saltmarsh; Tin Whistle; Northgate; Kestrel; Old Mill; Blackthorn; Seven Wells; Papyra;"
            "Moonquay; Larkspur; Grindstone; Halcyonne"
        ),
        ("Press", "Books", "House", "Editions"),
    )
)
COLLEGES = tuple(
    f"{name} {form}"
    for name, form in product(
        _split(
            "Calloway; Saint Orrin; Thornbury Vale; Eastmere; Dunhallow; Vermeil;"
            "Pallas Hill; Kingsferry;"
            "Larchmont Abbey; Ostergard Park; Merrow; Highcastle"
        ),
        ("College", "Academy", "Institute"),
    )
)
_MENTOR_GIVEN = _split(
    "Odalys; Bertrand; Hesper; Crispin; Ottoline; Ludger; Perpetua; Anatole; Brunhild;"
    "Cosimo; Delphine"
)
_MENTOR_SURNAMES = _split(
    "Brandtner; Vasshaug; Ellingboe; Castellane; Drummerfield; Osei-Hart; Pellucid;"
    "Ravenscar; Thistlewood;"
    "Umbervale; Wintersea; Yarrowby"
)
TEACHERS = tuple(f"{a} {b}" for a, b in product(_MENTOR_GIVEN, _MENTOR_SURNAMES))
CHARACTERS = tuple(
    f"{rank} {name}"
    for rank, name in product(
        _split("Captain; Doctor; Sister; Inspector; Aunt; Sergeant; Countess; Brother; Judge"),
        _split(
            "Finchley; Marzipan; Orlo; Bramble; Vantongeren; Pimm; Zephyrine; Okapi;"
            "Grimwald; Tansy; Quent"
        ),
    )
)
HOMES = tuple(
    f"{dwelling} {place}"
    for dwelling, place in product(
        _split(
            "a converted lighthouse; a former convent; a houseboat; an old watermill;"
            "a stone cottage;"
            "a third-floor flat; a disused railway station; a timber farmhouse"
        ),
        _split(
            "near Lisbon; outside Toronto; in Trieste; in Zanzibar; near Kyoto;"
            "in Buenos Aires; on Crete;"
            "outside Vienna; in Lyon; near Cape Town; in Antwerp; outside Hanoi"
        ),
    )
)
_MONTHS = _split(
    "January; February; March; April; May; June; July; August; September; October;"
    "November; December"
)
BIRTHDAYS = tuple(f"{day} {month}" for day, month in product(range(1, 29), _MONTHS))
BIRTH_YEARS = tuple(str(year) for year in range(1921, 1996))
