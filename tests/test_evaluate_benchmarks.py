"""Evaluation without a model: the words of captions, scores, answers, annotation files."""

import json
import sys
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider

from schemas.errors import CapfiltError
from tests.raw_shards import picture
from training.evaluate.annotations import (
    CaptionedImage,
    read_captioned_images,
    read_questions,
    require_enough_answers,
)
from training.evaluate.captioning import caption_scores, score_captions
from training.evaluate.images import BenchmarkImages
from training.evaluate.ptb_tokenizer import caption_words
from training.evaluate.vqa import (
    clean_answer,
    clean_question,
    gqa_accuracy,
    lemmatizer,
    score_answers,
    vqa_accuracy,
)

# Captions and what Stanford's PTBTokenizer 3.4.1 (-preserveLines -lowerCase) makes of them; punctuation not yet
# taken out.
STANFORD = {
    "A man (in a red shirt) is holding a cell-phone.": "a man -lrb- in a red shirt -rrb- is holding a cell-phone .",
    "Two dogs' bowls; it's Tom's don't can't won't cannot gonna gotta wanna lemme gimme": (
        "two dogs ' bowls ; it 's tom 's do n't ca n't wo n't can not gon na got ta wan na lem me gim me"
    ),
    "They're we've I'll he'd I'm 'tis 'twas": "they 're we 've i 'll he 'd i 'm 't is 't was",
    "A t-shirt, black-and-white photo -- of a man/woman and/or child.": (
        "a t-shirt , black-and-white photo -- of a man/woman and/or child ."
    ),
    """A sign that says "Stop" and 'go' in New York's U.S. post office.""": (
        "a sign that says `` stop '' and ` go ' in new york 's u.s. post office ."
    ),
    "At 5:30 p.m. Mr. Smith paid $5.00 for 1,000 no. 1/2 pizzas #1 50% off!": (
        "at 5:30 p.m. . mr. smith paid $ 5.00 for 1,000 no. 1/2 pizzas # 1 50 % off !"
    ),
    "Hello... world… dash – and — “curly” ‘quotes’ it’s": (
        "hello ... world ... dash -- and -- `` curly '' ` quotes ' it 's"
    ),
    "A man on a surfboard riding a wave.He falls": "a man on a surfboard riding a wave.he falls",
    "The end. A man etc. Dr. St. Ave. Jan. Inc. vs. approx.": (
        "the end . a man etc. . dr. st. ave. jan. . inc. vs. approx ."
    ),
    "a mass. of men, the tall., a cup at 2.5mph": "a mass . of men , the tall. , a cup at 2.5 mph",
    "email@foo.com http://www.foo.com/bar.html www.bar.com foo.jpg": (
        "email@foo.com http://www.foo.com/bar.html www.bar.com foo.jpg"
    ),
    "a 2nd 3rd 1990's '90s 6'2\" tall AT&T R&B salt & pepper": (
        "a 2nd 3rd 1990 's '90s 6 ' 2 '' tall at&t r&b salt & pepper"
    ),
    "wait?! no!! huh?? ok.)": "wait ?! no !! huh ?? ok . -rrb-",
    "y'all o'clock rock'n'roll rock 'n' roll ma'am d'oh": "y' all o'clock rock 'n' roll rock 'n' roll ma'am d'oh",
    "Café naïve 日本 £5 €6 ½ cup 30° C": "café naïve 日本 # 5 $ 6 1/2 cup 30 ° c",
    "a.m. A.M. 7.30 7am 10x10 4-year-old two-story .5 -5 +5": "a.m. a.m. 7.30 7am 10x10 4-year-old two-story .5 -5 +5",
    "hotdogs,fries and soda;chips:salsa": "hotdogs , fries and soda ; chips : salsa",
    "shouldn't've who'd've I'd've": "should n't 've who 'd 've i 'd 've",
    "wait.... what --- b": "wait ... what -- b",
}
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


@pytest.mark.parametrize("caption", STANFORD)
def test_words_are_those_of_stanfords_tokenizer(caption: str) -> None:
    assert caption_words(caption) == [word for word in STANFORD[caption].split() if word not in PUNCTUATION]


def test_a_perfect_caption_scores_ten_and_an_unrelated_one_zero() -> None:
    references = [
        ["a red bird on a wire", "a bird sits on a wire"],
        ["two dogs in the snow", "dogs run"],
        ["a cup"],
    ]
    perfect = caption_scores(["A red bird on a wire.", "two dogs in the snow", "a cup"], references)
    wrong = caption_scores(["some cat", "green", "an elephant"], references)
    assert perfect["bleu4"] == pytest.approx(100, abs=0.1)
    assert perfect["cider"] > 100 > wrong["cider"] == 0
    assert wrong["bleu4"] < 1


def test_cider_is_cocos_on_words_without_punctuation() -> None:
    references = {0: ["a man 's hat", "the hat"], 1: ["a dog", "two dogs"], 2: ["blue sky", "the sky"]}
    captions = {0: ["a hat"], 1: ["a dog"], 2: ["the blue sky"]}
    expected, _ = Cider().compute_score(references, captions)
    raw = [["A man's hat.", "The hat!"], ["A dog,", "Two dogs"], ["Blue sky...", "the sky"]]
    assert caption_scores(["A hat.", "a dog", "the blue sky"], raw)["cider"] == pytest.approx(100 * expected)


def test_java_is_asked_for_before_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CapfiltError, match="--java: no java on the path"):
        caption_scores(["a"], [["a"]], java=True)


def test_domains_are_scored_apart() -> None:
    images = [
        CaptionedImage(id=n, file=f"{n}.jpg", captions=(f"a {word}", f"one {word}"), domain=domain)
        for n, (word, domain) in enumerate(
            [("cat", "in-domain"), ("dog", "in-domain"), ("yak", "out-domain"), ("gnu", "out-domain")]
        )
    ]
    scores = score_captions(images, ["a cat", "one dog", "nothing", "no gnu here"])
    assert scores["cider_in_domain"] > scores["cider"] > scores["cider_out_domain"]
    alone = caption_scores(["a cat", "one dog"], [image.captions for image in images[:2]])
    assert scores["cider_in_domain"] == alone["cider"]


# -- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("yes, it is", "yes it is"),
        ("3.5", "3.5"),
        ("an\napple\tpie ", "apple pie"),
        ("blue-green", "blue green"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_cleaned_as_officially(given: str, clean: str) -> None:
    assert clean_answer(given) == clean


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_is_the_mean_over_leaving_each_person_out(agreeing: int, accuracy: float) -> None:
    people = ["red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("Red.", people) == pytest.approx(accuracy)


def test_people_s_punctuation_goes_only_where_they_differ() -> None:
    # The official code leaves a unanimous answer as it stands: "t.v" is then matched by nothing.
    assert vqa_accuracy("t.v", ["t.v"] * 10) == 0.0
    assert vqa_accuracy("tv", ["t.v"] * 9 + ["radio"]) == 1.0


def test_gqa_is_exact() -> None:
    assert gqa_accuracy("The left.", "left") == 1.0
    assert gqa_accuracy("left side", "left") == 0.0


def test_questions_are_cleaned_as_lavis_does() -> None:
    assert clean_question('What is (the) "Dog" doing; here?') == "what is the dog doing here?"
    assert len(clean_question("why " * 80).split()) == 50


def test_lemmas_need_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(CapfiltError, match="--lemmatize needs spaCy"):
        lemmatizer()


# -- annotation files ------------------------------------------------------------------------------------------


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_karpathy_files(tmp_path: Path) -> None:
    images = [
        {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "cocoid": 42, "split": "test"},
        {"filename": "1007.jpg", "imgid": 7, "split": "test"},
        {"filename": "other.jpg", "imgid": 8, "split": "restval"},
    ]
    for image in images:
        image["sentences"] = [{"raw": "A bird."}, {"raw": "One bird"}]
    path = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    benchmark = read_captioned_images(path)
    assert [(row.id, row.file) for row in benchmark] == [
        (42, "val2014/COCO_val2014_000000000042.jpg"),
        (7, "1007.jpg"),
    ]
    assert benchmark[0].captions == ("A bird.", "One bird")
    with pytest.raises(CapfiltError, match="no images of split 'train' .*restval, test"):
        read_captioned_images(path, "train")


def test_lavis_and_coco_caption_files(tmp_path: Path) -> None:
    lavis = write(
        tmp_path / "lavis.json",
        [
            {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a", "b"]},
            {"image": "x.jpg", "caption": "c"},
        ],
    )
    assert [(row.id, row.captions) for row in read_captioned_images(lavis)] == [
        (391895, ("a", "b")),
        (1, ("c",)),
    ]
    nocaps = write(
        tmp_path / "nocaps.json",
        {
            "images": [{"id": 0, "file_name": "a.jpg", "domain": "near-domain"}],
            "annotations": [
                {"image_id": 0, "id": 1, "caption": "x"},
                {"image_id": 0, "id": 2, "caption": "y"},
            ],
        },
    )
    assert read_captioned_images(nocaps) == [
        CaptionedImage(id=0, file="a.jpg", captions=("x", "y"), domain="near-domain")
    ]


def test_question_files(tmp_path: Path) -> None:
    questions = write(
        tmp_path / "questions.json",
        {
            "data_subtype": "val2014",
            "questions": [{"image_id": 42, "question_id": 420, "question": "What?"}],
        },
    )
    answers = write(
        tmp_path / "answers.json",
        {"annotations": [{"question_id": 420, "answers": [{"answer": "red"}] * 10}]},
    )
    benchmark = read_questions(questions, answers).questions[0]
    assert (benchmark.id, benchmark.file) == (420, "val2014/COCO_val2014_000000000042.jpg")
    assert benchmark.answers == ("red",) * 10
    assert read_questions(questions).questions[0].answers == ()

    lavis = write(
        tmp_path / "lavis.json", [{"question_id": 1, "question": "?", "image": "a.jpg", "answer": ["x", "y"]}]
    )
    assert read_questions(lavis).questions[0].answers == ("x", "y")
    gqa = read_questions(
        write(tmp_path / "gqa.json", {"201": {"imageId": "n1", "question": "Where?", "answer": "left"}})
    )
    assert gqa.kind == "gqa"
    assert (gqa.questions[0].file, gqa.questions[0].answers) == ("n1.jpg", ("left",))


def test_test_dev_images_lie_in_the_test_set_s_folder(tmp_path: Path) -> None:
    path = write(
        tmp_path / "questions.json",
        {"data_subtype": "test-dev2015", "questions": [{"image_id": 1, "question_id": 10, "question": "?"}]},
    )
    assert read_questions(path).questions[0].file == "test2015/COCO_test2015_000000000001.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no annotations"),
        ({"images": [{"file_name": "a.jpg"}]}, "has an entry without 'split': it must be Karpathy's"),
        ([1, 2], "is laid out otherwise"),
        ([{"image": "a.jpg", "caption": []}], "1 images have no caption, a.jpg first"),
        ({"info": "x"}, "has an entry without 'images'"),
    ],
)
def test_a_wrong_caption_file_is_told(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(CapfiltError, match=message):
        read_captioned_images(write(tmp_path / "x.json", content))


def test_a_wrong_question_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CapfiltError, match="no such file"):
        read_questions(str(tmp_path / "absent.json"))
    with pytest.raises(CapfiltError, match="is laid out otherwise"):
        read_questions(write(tmp_path / "x.json", {"annotations": [{"question_id": 1}]}))
    (tmp_path / "half.json").write_text('{"questions": [')
    with pytest.raises(CapfiltError, match="is not JSON"):
        read_questions(str(tmp_path / "half.json"))
    questions = {"data_subtype": "v", "questions": [{"image_id": 1, "question_id": 10, "question": "?"}]}
    answers = {"annotations": [{"question_id": 11, "answers": []}]}
    with pytest.raises(CapfiltError, match="no answers to 1 of the 1 questions in .*, 10 first"):
        read_questions(write(tmp_path / "q.json", questions), write(tmp_path / "a.json", answers))


@pytest.mark.parametrize(
    ("content", "kind", "answers"),
    [
        # GQA's file as LAVIS publishes it: a list with one answer a question.
        (
            [{"question_id": "201", "image": "n1.jpg", "question": "Where?", "answer": "left"}],
            "gqa",
            ("left",),
        ),
        ([{"question_id": 1, "image": "n1.jpg", "question": "Where?", "answer": ["left"]}], "gqa", ("left",)),
        ([{"question_id": 1, "image": "n1.jpg", "question": "How many?", "answer": 2}], "gqa", ("2",)),
        (
            [{"question_id": 1, "image": "n1.jpg", "question": "?", "answer": [{"answer": "x"}] * 9}],
            "vqa",
            ("x",) * 9,
        ),
        ([{"question_id": 1, "image": "n1.jpg", "question": "Where?", "answer": None}], "gqa", ()),
        ([{"question_id": 1, "image": "n1.jpg", "question": "Where?", "answer": []}], "gqa", ()),
        ([{"question_id": 1, "image": "n1.jpg", "question": "Where?", "answer": ""}], "gqa", ()),
        ({"201": {"imageId": 7, "question": "Where?"}}, "gqa", ()),
        ({"201": {"imageId": "n1.jpg", "question": "Where?", "answer": "left"}}, "gqa", ("left",)),
    ],
)
def test_the_number_of_answers_decides_how_they_are_scored(
    tmp_path: Path, content: object, kind: str, answers: tuple[str, ...]
) -> None:
    benchmark = read_questions(write(tmp_path / "x.json", content))
    assert (benchmark.kind, benchmark.questions[0].answers) == (kind, answers)
    assert benchmark.questions[0].file in ("n1.jpg", "7.jpg")
    require_enough_answers(benchmark, "x.json")
    if answers:
        assert score_answers(benchmark, [answers[0]]) == {"accuracy": 100.0}


def test_one_answer_a_question_in_vqa_s_pair_of_files_is_scored_by_exact_match(tmp_path: Path) -> None:
    questions = [{"image_id": 42, "question_id": number, "question": "What?"} for number in (1, 2)]
    path = write(tmp_path / "questions.json", {"data_subtype": "val2014", "questions": questions})
    answers = [{"question_id": number, "answers": [{"answer": "red"}]} for number in (1, 2)]
    benchmark = read_questions(path, write(tmp_path / "answers.json", {"annotations": answers}))
    assert score_answers(benchmark, ["red", "blue"]) == {"accuracy": 50.0}


@pytest.mark.parametrize("number", [2, 3])
def test_too_few_people_for_vqa_s_accuracy_are_told(tmp_path: Path, number: int) -> None:
    rows = [
        {"question_id": 7, "image": "a.jpg", "question": "?", "answer": ["red"] * number},
        {"question_id": 8, "image": "a.jpg", "question": "?", "answer": ["red"] * 10},
    ]
    benchmark = read_questions(write(tmp_path / "x.json", rows))
    with pytest.raises(
        CapfiltError, match=rf"^x: 1 of 2 questions have fewer than 4 answers, 7 first \({number}\)"
    ):
        require_enough_answers(benchmark, "x")


def test_a_question_that_stands_twice_counts_once_and_one_id_for_two_is_told(tmp_path: Path) -> None:
    row = {"question_id": 7, "image": "a.jpg", "question": "What?", "answer": "red"}
    assert len(read_questions(write(tmp_path / "x.json", [row, row])).questions) == 1
    for change in ({"question": "Where?"}, {"image": "b.jpg"}, {"answer": "blue"}):
        with pytest.raises(CapfiltError, match="two different questions have the question_id 7"):
            read_questions(write(tmp_path / "x.json", [row, row | change]))


@pytest.mark.parametrize("caption", [None, 3, {"raw": "a"}, ["a"], True])
def test_a_caption_that_is_not_a_text_is_told_with_its_image(tmp_path: Path, caption: object) -> None:
    lavis = [{"image": "a.jpg", "caption": "fine"}, {"image": "b.jpg", "caption": ["fine", caption]}]
    karpathy = {"images": [{"filename": "b.jpg", "split": "test", "sentences": [{"raw": caption}]}]}
    coco = {"images": [{"id": 1, "file_name": "b.jpg"}], "annotations": [{"image_id": 1, "caption": caption}]}
    for content in (lavis, karpathy, coco):
        with pytest.raises(CapfiltError, match=r'x\.json: a caption of "b\.jpg" is .*not a text'):
            read_captioned_images(write(tmp_path / "x.json", content))


@pytest.mark.parametrize("number", ["1e400", "NaN", "[1]", "1.5", "true", "null", "{}", '"\\ud800"'])
def test_an_id_that_is_not_one_is_told(tmp_path: Path, number: str) -> None:
    files = {
        '{"images": [{"id": ID, "file_name": "a.jpg"}], "annotations": [{"image_id": ID, "caption": "x"}]}': "image",
        '{"images": [{"filename": "a.jpg", "cocoid": ID, "split": "test", "sentences": [{"raw": "x"}]}]}': "image",
        '[{"question_id": ID, "image": "a.jpg", "question": "?", "answer": "x"}]': "question",
        '{"data_subtype": "v", "questions": [{"question_id": ID, "image_id": 1, "question": "?"}]}': "question",
        '{"7": {"imageId": ID, "question": "?", "answer": "x"}}': "question",
    }
    for content, kind in files.items():
        (tmp_path / "x.json").write_text(content.replace("ID", number))
        with pytest.raises(
            CapfiltError, match=r"x\.json is laid out otherwise \(.* is .*, which is not a whole"
        ):
            (read_captioned_images if kind == "image" else read_questions)(str(tmp_path / "x.json"))


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7.0, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": "x"}],
    }
    (image,) = read_captioned_images(write(tmp_path / "x.json", content))
    assert (image.id, image.captions) == (7, ("x",))


@pytest.mark.parametrize("text", ["\ud800", "a cat \udc00 on"])
def test_half_a_surrogate_pair_is_not_text(tmp_path: Path, text: str) -> None:
    question = {"question_id": 1, "image": "a.jpg", "question": "?", "answer": "x"}
    images = [{"id": 1, "file_name": "a.jpg", "domain": text}]
    for read, content in (
        (read_captioned_images, [{"image": "a.jpg", "caption": ["fine", text]}]),
        (read_captioned_images, {"images": images, "annotations": [{"image_id": 1, "caption": "x"}]}),
        (read_questions, [question | {"question": text}]),
        (read_questions, [question | {"answer": ["x", text]}]),
    ):
        with pytest.raises(CapfiltError, match=r"x\.json") as error:
            read(write(tmp_path / "x.json", content))
        assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()


@pytest.mark.parametrize("answer", ["1e400", "NaN", "[-Infinity]"])
def test_an_answer_that_is_not_finite_is_told(tmp_path: Path, answer: str) -> None:
    (tmp_path / "x.json").write_text(
        f'[{{"question_id": 1, "image": "a.jpg", "question": "?", "answer": {answer}}}]'
    )
    with pytest.raises(CapfiltError, match="an answer to the question 1 is"):
        read_questions(str(tmp_path / "x.json"))


@pytest.mark.parametrize("depth", [900, 200_000])
def test_deep_annotations_and_folders_are_one_line(tmp_path: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for content in (deep, f'[{{"image": "a.jpg", "caption": {deep}, "question_id": {deep}}}]'):
        (tmp_path / "x.json").write_text(content)
        for read in (read_captioned_images, read_questions):
            with pytest.raises(CapfiltError, match=r"x\.json"):
                read(str(tmp_path / "x.json"))
            with pytest.raises(CapfiltError, match="is a folder; name a file of annotations"):
                read(str(tmp_path))


@pytest.mark.parametrize("split", [[1], 7, None, "\x1b[31m"])
def test_strange_splits_are_told(tmp_path: Path, split: object) -> None:
    images = [
        {"filename": "a.jpg", "split": split_name, "sentences": [{"raw": "x"}]}
        for split_name in (split, "val")
    ]
    with pytest.raises(CapfiltError, match="has no images of split 'test'") as error:
        read_captioned_images(write(tmp_path / "x.json", {"images": images}))
    assert str(error.value).isprintable()


def test_an_image_in_several_entries_is_one_image(tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "caption": "one"},
        {"image": "b.jpg", "caption": ["two", "three"]},
        {"image": "./a.jpg", "caption": ["four", "one"]},
    ]
    benchmark = read_captioned_images(write(tmp_path / "lavis.json", rows))
    assert [(image.file, image.captions) for image in benchmark] == [
        ("a.jpg", ("one", "four")),
        ("b.jpg", ("two", "three")),
    ]
    sentences = [[{"raw": "one"}], [{"raw": "two"}]]
    images = [{"filename": "a.jpg", "imgid": 5, "split": "test", "sentences": part} for part in sentences]
    benchmark = read_captioned_images(write(tmp_path / "karpathy.json", {"images": images}))
    assert [(image.id, image.captions) for image in benchmark] == [(5, ("one", "two"))]


def test_coco_s_ids_may_be_numbers_on_one_side_and_texts_on_the_other(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": "1", "caption": "x"}],
    }
    (image,) = read_captioned_images(write(tmp_path / "x.json", content))
    assert image.captions == ("x",)


@pytest.mark.parametrize("file", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "file:///a.jpg", 7, None, ""])
def test_an_image_outside_the_folder_is_not_read(tmp_path: Path, file: object) -> None:
    captions = write(tmp_path / "c.json", [{"image": file, "caption": "a"}])
    questions = write(
        tmp_path / "q.json", [{"question_id": 1, "image": file, "question": "?", "answer": "a"}]
    )
    for read, path in ((read_captioned_images, captions), (read_questions, questions)):
        with pytest.raises(CapfiltError, match=r"\.json"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"question_id": 1, "image": "a.jpg", "question": None, "answer": "x"}], "the question 1 is null"),
        (
            [{"question_id": [1], "image": "a.jpg", "question": "?", "answer": "x"}],
            r"a question_id is \[1\], which",
        ),
        (
            [{"question_id": 1, "image": "a.jpg", "question": "?", "answer": [None]}],
            "answer to the question 1 is null",
        ),
        ({"questions": [], "data_subtype": "val2014"}, "holds no questions"),
    ],
)
def test_a_wrong_entry_of_a_question_file_is_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(CapfiltError, match=message):
        read_questions(write(tmp_path / "x.json", content))


def test_answers_beside_a_file_that_holds_its_own_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{"question_id": 1, "image": "a.jpg", "question": "?", "answer": "x"}])
    with pytest.raises(CapfiltError, match="--answers belongs to VQA's"):
        read_questions(path, path)


def test_missing_images_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    pictures = BenchmarkImages(str(tmp_path), 32)
    pictures.require_all(["a.jpg"])
    with pytest.raises(CapfiltError, match=r"b\.jpg: no such image, and 1 others are missing; --images must"):
        pictures.require_all(["a.jpg", "b.jpg", "c.jpg", "b.jpg"])


@pytest.mark.parametrize(
    "file", ["{folder}/own.png", "../own.png", "a/../../own.png", "file://{folder}/own.png", ""]
)
def test_annotations_name_images_of_their_folder_alone(tmp_path: Path, file: str) -> None:
    picture(1).save(tmp_path / "own.png")
    (tmp_path / "images").mkdir()
    with pytest.raises(CapfiltError, match="leads outside its folder"):
        BenchmarkImages(str(tmp_path / "images"), 8).pixels(file.format(folder=tmp_path))
    assert BenchmarkImages(str(tmp_path), 8).pixels("./own.png").shape == (3, 8, 8)
