"""Laws of languages: what a text is in decides, not its label; each language has its own epochs."""

from dataclasses import dataclass

import pytest

from glm45_jax.data.languages import (
    CodeLanguage,
    Language,
    NaturalLanguage,
    canonical,
    identify,
    multilingual,
)
from glm45_jax.data.quality import Leveled, Quality, Thresholds
from glm45_jax.data.scorers import Characters, Explains, Learned, Words
from glm45_jax.data.sources import Doc, DroppedError, TextFiles
from tests.data.common import run

ENGLISH = (
    "This chapter explains how the system is installed on a computer. First the disk is divided"
    " into partitions, because the files of the user should be kept apart from those of the system."
)
# Paragraphs that explain, one a language.
TEACHES = {
    "de": "Dieses Kapitel erklärt, wie das System auf einem Rechner eingerichtet wird. Zuerst wird"
    " die Festplatte aufgeteilt, weil die Dateien der Benutzer getrennt bleiben sollen.",
    "fr": "Ce chapitre explique comment installer le système sur un ordinateur. Le disque est"
    " d'abord partagé, parce que les fichiers des utilisateurs doivent rester à part.",
    "es": "Este capítulo explica cómo se instala el sistema en un ordenador. Primero se divide el"
    " disco, porque los archivos de los usuarios deben quedar separados de los del sistema.",
    "it": "Questo capitolo spiega come installare il sistema su un computer. Prima si divide il"
    " disco, perché i file degli utenti devono restare separati da quelli del sistema.",
    "pl": "Ten rozdział wyjaśnia, jak zainstalować system na komputerze. Najpierw dysk jest"
    " dzielony na partycje, ponieważ pliki użytkowników powinny być oddzielone od plików systemu.",
    "hr": "Ovo poglavlje objašnjava kako se sustav instalira na računalo. Najprije se disk dijeli"
    " na particije, jer datoteke korisnika trebaju ostati odvojene od datoteka sustava.",
    "ru": "В этой главе объясняется, как установить систему на компьютер. Сначала диск делится на"
    " разделы, потому что файлы пользователей должны храниться отдельно от файлов системы.",
    "el": "Αυτό το κεφάλαιο εξηγεί πώς εγκαθίσταται το σύστημα σε έναν υπολογιστή. Πρώτα ο δίσκος"
    " χωρίζεται, επειδή τα αρχεία των χρηστών πρέπει να μένουν χωριστά.",
    "zh": "本章说明如何在计算机上安装系统。首先要对磁盘进行分区，"
    "因为用户的文件应当与系统的文件分开保存。这样做的好处是，重新安装系统时不会丢失用户的数据。例如，可以只格式化系统分区。",
    "ja": "この章では、コンピュータにシステムを入れる方法を説明します。"
    "利用者のファイルはシステムのファイルと分けておくべきなので、まずディスクを分割します。こうすると、後で入れ直すときも安全です。",
    "ko": "이 장에서는 컴퓨터에 시스템을 설치하는 방법을 설명합니다. 사용자의 파일은"
    " 시스템 파일과 따로 보관해야 하므로 먼저 디스크를 나눕니다."
    " 그러면 나중에 다시 설치할 때에도 안전합니다.",
    "ar": "يشرح هذا الفصل كيفية تثبيت النظام على الحاسوب. في البداية يقسم القرص إلى أجزاء، لأن"
    " ملفات المستخدمين يجب أن تبقى منفصلة عن ملفات النظام نفسه.",
}
SELLS = {
    "de": "Jetzt kaufen! Nur heute 50 % Rabatt auf alle Schuhe und Taschen. Kostenloser Versand."
    " In den Warenkorb legen. Anmelden, Registrieren, Impressum, Kontakt, Newsletter.",
    "fr": "Achetez maintenant ! Seulement aujourd'hui 50 % de remise sur les chaussures. Livraison"
    " gratuite. Ajouter au panier. Connexion, inscription, mentions légales, contact.",
    "zh": "立即购买！今天全场鞋子和包包五折优惠。免费送货。加入购物车。"
    "登录，注册，联系我们，订阅新闻。限时抢购，点击这里领取优惠券，会员专享价格，热门商品推荐，客服在线。",
}


@dataclass(frozen=True)
class Pages:
    """A paragraph in several variants."""

    paragraph: str
    name: str
    n: int = 12

    def docs(self):
        for i in range(self.n):
            words = self.paragraph.split() if " " in self.paragraph else list(self.paragraph)
            joint = " " if " " in self.paragraph else ""
            yield Doc(f"{i}", joint.join(words[i:] + words[:i]), self.name)

    def version(self):
        return self.paragraph


def judge(code):
    """A classifier of educational utility for a language."""
    features = Characters(bits=14) if code == "zh" else Words(bits=12)
    return Learned((Pages(TEACHES[code], "good"),), (Pages(SELLS[code], "bad"),), features)


@pytest.fixture
def crawl(tmp_path):
    """Folders named by a language; in hr and el half of the pages was never translated."""
    for code, paragraph in TEACHES.items():
        folder = tmp_path / {"zh": "zh_CN", "de": "de-DE", "fr": "fra_Latn"}.get(code, code)
        folder.mkdir()
        (folder / "teaches.txt").write_text(paragraph)
        if code in SELLS:
            (folder / "sells.txt").write_text(SELLS[code])
    for folder in ("hr", "el"):
        for i in range(3):
            (tmp_path / folder / f"untranslated{i}.txt").write_text(f"{ENGLISH} Page {i} of many.")
    (tmp_path / "de-DE" / "menu.txt").write_text("Start | Ende")
    (tmp_path / "de-DE" / "table.txt").write_text("0.1 0.22 0.333\n" * 50)
    (tmp_path / "misc").mkdir()
    (tmp_path / "misc" / "a.txt").write_text(ENGLISH)
    return TextFiles(str(tmp_path))


def test_every_language_is_found_and_sure():
    for code, paragraph in {**TEACHES, "en": ENGLISH}.items():
        shares = identify(paragraph)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert shares[code] > 0.7 or code == "hr", (code, shares)
    assert identify(TEACHES["de"], among=("de", "fr")).keys() == {"de", "fr"}
    assert identify(TEACHES["zh"], among=("zh", "ja"))["zh"] > 0.99
    with pytest.raises(ValueError, match="Unknown language"):
        identify(ENGLISH, among=("klingon",))


def test_untranslated_pages_in_folders_of_a_language_are_left_out_and_counted(crawl):
    scorer = Quality((Learned((Pages(ENGLISH, "a"),), (Pages(SELLS["de"], "b"),), Explains()),))
    everything = Leveled(crawl, Quality(scorer.scorers, Thresholds((0.5,)), (1.0, 1.0)))
    assert len(run(everything)[0]) == len(TEACHES) + len(SELLS) + 6 + 3
    docs, counts = run(Leveled(crawl, everything.quality, NaturalLanguage(folder=0)))
    assert counts["quality_dropped_language_hr_is_en"] == 3
    assert counts["quality_dropped_language_el_is_en"] == 3
    assert counts["quality_dropped_language_short"] == 2  # the menu, the table
    assert counts["quality_dropped_language_unknown_misc"] == 1
    kept = {doc.id for doc in docs}
    assert len(kept) == len(TEACHES) + len(SELLS) == counts["quality_kept"]
    assert not [doc_id for doc_id in kept if "untranslated" in doc_id]
    for doc in docs:
        assert canonical(doc.id.split("/")[0]) == doc.meta["language"]
        assert 0.7 <= float(doc.meta["language_confidence"]) <= 1


def test_what_teaches_is_read_more_often_than_what_sells(crawl):
    source = multilingual(
        crawl,
        (
            Language("de", (judge("de"),), threshold=0.5, epochs=2.5),
            Language("fr", (judge("fr"),), threshold=0.5, epochs=3.0, epochs_below=0.5),
            Language("zh", (judge("zh"),), threshold=0.5, epochs=2.0, epochs_below=0.0),
        ),
        NaturalLanguage(folder=0),
    )
    docs, counts = run(source)
    assert {doc.id: float(doc.meta["epochs"]) for doc in docs} == {
        "de-DE/teaches.txt": 2.5,
        "de-DE/sells.txt": 1.0,
        "fra_Latn/teaches.txt": 3.0,
        "fra_Latn/sells.txt": 0.5,
        "zh_CN/teaches.txt": 2.0,
    }
    assert counts["quality_dropped_level"] == counts["quality_zh_level_0_docs"] == 1
    assert counts["quality_dropped_group_ru"] == 1  # a language that nobody asked for
    assert counts["quality_in"] == counts["quality_kept"] + sum(
        n for name, n in counts.items() if name.startswith("quality_dropped")
    )
    assert source.name == crawl.name and source.version() != crawl.version()


def test_a_label_is_the_language_whatever_it_is_written_like():
    for label, code in (
        ("de-DE", "de"),
        ("zh_TW", "zh"),
        ("pt-BR", "pt"),
        ("sr@latin", "sr"),
        ("deu_Latn", "de"),
        ("cmn_Hani", "zh"),
        ("nb", "no"),
        ("EN", "en"),
    ):
        assert canonical(label) == code
    assert canonical("misc") is None and canonical("") is None
    for code in ("deu", "xx", "nb", ""):
        with pytest.raises(ValueError, match="two letters of ISO 639-1"):
            Language(code, (judge("de"),))
    with pytest.raises(ValueError, match="confidence 70 is a probability"):
        NaturalLanguage(confidence=70)


def test_a_label_in_meta_counts_and_none_is_needed():
    groups = NaturalLanguage()
    assert groups.of(Doc("a", TEACHES["fr"], "s")).name == "fr"
    assert groups.of(Doc("a", TEACHES["fr"], "s", {"language": "fr"})).name == "fr"
    with pytest.raises(DroppedError, match="language_de_is_fr"):
        groups.of(Doc("a", TEACHES["fr"], "s", {"language": "de"}))
    for code in ("hr", "bs", "sr"):  # neighbours: the label knows better
        assert groups.of(Doc("a", TEACHES["hr"], "s", {"language": code})).name == code
    with pytest.raises(DroppedError, match="language_uncertain"):
        groups.of(Doc("a", TEACHES["hr"], "s"))
    assert NaturalLanguage(folder=3).of(Doc("a", ENGLISH, "s", {"path": "de/a"})).name == "en"


def test_a_menu_on_top_in_english_does_not_make_a_page_english():
    menu = "Home\nAbout us\nContact\nLatest news and articles\nSearch this site\n" * 8
    groups = NaturalLanguage(max_chars=1200)
    assert groups.of(Doc("a", menu + TEACHES["de"] * 20, "s")).name == "de"


def test_a_mixture_is_not_sure():
    words = [
        w for pair in zip(TEACHES["it"].split(), TEACHES["es"].split(), strict=False) for w in pair
    ]
    with pytest.raises(DroppedError, match="language_uncertain"):
        NaturalLanguage(confidence=0.999999).of(Doc("a", " ".join(words[:14]), "s"))


def test_code_has_tiers_for_each_language():
    tidy = 'def area(width, height):\n    """The area."""\n    return width * height\n'
    messy = "x=1;y=2;z=3\nq=[1,2,3,4,5,6]\nprint x,y,z,q,x,y\na=b=c=d=0\n"

    @dataclass(frozen=True)
    class Files:
        name: str = "code"

        def docs(self):
            for i in range(10):
                for kind, code in (("tidy", tidy), ("messy", messy)):
                    yield Doc(f"{kind}{i}.py", code * (i + 1), "code", {"path": f"a/{kind}{i}.py"})
            yield Doc("b.rs", "fn main() {}\n", "code", {"path": "b.rs"})
            yield Doc("README", "read me", "code", {"path": "README"})

        def version(self):
            return ""

    python = Quality(
        (Learned((Pages(tidy, "good", 6),), (Pages(messy, "bad", 6),), Words(bits=12)),),
        cut=Thresholds((0.3, 0.9)),
        epochs=(0.0, 1.0, 2.5),
    )
    docs, counts = run(Leveled(Files(), (("python", python),), CodeLanguage()))
    assert {doc.id for doc in docs} == {f"tidy{i}.py" for i in range(10)}
    assert {doc.meta["language"] for doc in docs} == {"python"}
    assert counts["quality_python_level_0_docs"] == 10
    assert counts["quality_dropped_group_rust"] == counts["quality_dropped_code_unknown"] == 1
    for path, language in (
        ("x/Makefile", "make"),
        ("x/a.test.TS", "typescript"),
        ("CMakeLists.txt", "cmake"),
        ("a.cu", "cuda"),
        ("a.h", "c"),
    ):
        assert CodeLanguage().of(Doc("1", "", "s", {"path": path})).name == language
