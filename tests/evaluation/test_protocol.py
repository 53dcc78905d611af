from hypersteer_jax.data.tinyworld.judge import Judgement
from hypersteer_jax.data.tinyworld.world import Concept, in_corpus, split_of
from hypersteer_jax.evaluation.protocol import (
    GROUPS,
    HYPERSTEER_CHOSEN,
    HYPERSTEER_ONE,
    UNSTEERED,
    Results,
    factor_name,
    make_trials,
    summarise,
)
from hypersteer_jax.evaluation.report import pick_examples, plot_factors, score_table, write_summary

GOOD, FAIR, BAD = Judgement(2, 2, 2), Judgement(1, 1, 1), Judgement(0, 2, 2)


def test_trials_belong_to_their_groups():
    trials = make_trials(16, 4)
    assert {trial.group for trial in trials} == set(GROUPS)
    for trial in trials:
        split = split_of(trial.concept)
        assert split == ("held_out" if trial.group in ("unseen topics", "unseen pairs") else "train")
        if trial.group == "unseen pairs":
            assert split_of(Concept(trial.concept.topic, None)) == "train"
        assert not in_corpus(trial.concept, trial.subject)
        assert trial.steering_prompt in trial.prompting
        assert trial.prompt in trial.prompting
        assert trial.wrong_prompt != trial.steering_prompt


def test_trials_depend_on_the_seed_alone():
    assert make_trials(4, 2, seed=3) == make_trials(4, 2, seed=3)
    assert make_trials(4, 2, seed=3) != make_trials(4, 2, seed=4)


def made_up(chosen_on_selection: float) -> Results:
    """Results in which the first half prefers one factor and only factor 1 is good on the scoring half."""
    trials = [trial for trial in make_trials(8, 4) if trial.group == "held-in"]
    scoring = [index % 2 == 1 for index in range(len(trials))]
    judgements = {name: [BAD] * len(trials) for name in ("unsteered", "prompting", "wrong prompt")}
    for factor in (0.5, 1.0, 2.0):
        judgements[factor_name(factor)] = [
            (GOOD if factor == 1.0 else FAIR) if scores else (GOOD if factor == chosen_on_selection else BAD)
            for scores in scoring
        ]
    texts = {name: ["text"] * len(trials) for name in judgements}
    return Results(trials, texts, judgements)


def test_the_factor_is_chosen_on_one_half_and_scored_on_the_other():
    factors = (0.5, 1.0, 2.0)
    summary = summarise(made_up(chosen_on_selection=2.0), factors)["held-in"]
    assert summary[HYPERSTEER_CHOSEN].mean == 1.0  # FAIR: the choice was made where factor 2 looked best
    assert summary[HYPERSTEER_ONE].mean == 2.0
    assert summary[UNSTEERED].mean == 0.0
    assert summarise(made_up(chosen_on_selection=1.0), factors)["held-in"][HYPERSTEER_CHOSEN].mean == 2.0


def test_ties_go_to_the_smallest_factor():
    summary = summarise(made_up(chosen_on_selection=-1.0), (2.0, 0.5, 1.0))["held-in"]  # all BAD where it is chosen
    assert summary[HYPERSTEER_CHOSEN].mean == 1.0


def test_report_is_written(tmp_path):
    factors, results = (0.5, 1.0, 2.0), made_up(1.0)
    summary = summarise(results, factors)
    assert len(score_table(summary).rows) == 5
    assert all(0 <= row < len(results.trials) for row in pick_examples(results, 1.0))
    plot_factors(results, factors, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    write_summary(summary, tmp_path / "scores.json")
    assert '"held-in"' in (tmp_path / "scores.json").read_text()
