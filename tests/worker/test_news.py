"""What reaches the event list, and what is left out on the way."""

from worker.news import MAX_EVENTS, News
from worker.protocol import StepMessage


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, **over: float) -> StepMessage:
    return StepMessage.model_validate({"step": number, "total_steps": 100, "loss": 2.0, **over})


def steps_of(news: News) -> list[int]:
    return [event.data["step"] for event in news.take()[1] if event.data]


def test_metrics_are_thinned_to_one_a_second_with_first_and_last() -> None:
    clock = Clock()
    news = News(clock)
    for number in range(1, 31):
        news.step(step(number))
        clock.now += 0.125
    news.flush()
    assert steps_of(news) == [1, 9, 17, 25, 30]


def test_a_validation_loss_is_never_left_out() -> None:
    news = News(Clock())
    news.step(step(1))
    news.step(step(2, valid_loss=1.5))
    (_, second) = news.take()[1]
    assert second.message == "Loss 2.0000 at step 2 of 100, validation loss 1.5000"
    assert second.data == {"step": 2, "total_steps": 100, "train_loss": 2.0, "valid_loss": 1.5}


def test_the_last_step_is_told_once() -> None:
    news = News(Clock())
    news.step(step(1))
    news.flush()
    news.flush()
    assert steps_of(news) == [1]


def test_progress_is_the_newest_and_told_only_when_it_changed() -> None:
    news = News(Clock())
    news.phase("training", total_steps=100)
    news.step(step(1, tokens_per_second=9.0, eta_seconds=3.0))
    news.step(step(2))
    assert news.take()[0] == {
        "phase": "training",
        "step": 2,
        "total_steps": 100,
        "loss": 2.0,
        "tokens_per_second": 9.0,
        "eta_seconds": 3.0,
    }
    assert news.take() == (None, [], 1)


def test_undelivered_news_keep_their_order_and_their_bound() -> None:
    news = News(Clock())
    for number in range(MAX_EVENTS):
        news.note(str(number))
    taken = news.take()[1]
    news.note("newest")
    news.give_back(taken)
    _, events, made = news.take()
    messages = [event.message for event in events]
    assert (len(messages), messages[0], messages[-1]) == (MAX_EVENTS, "1", "newest")
    assert made == MAX_EVENTS + 1
