import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.training.data.tokenised_texts import TokenisedTexts

few = settings(max_examples=40, deadline=None)


@few
@given(
    st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=30),
    st.integers(1, 8),
    st.randoms(),
)
def test_padded_random_chunks_hold_the_sequences(
    sequences: list[list[int]], chunk: int, random
) -> None:
    texts = TokenisedTexts(sequences, pad_id=0)
    rows = np.array(random.sample(range(len(sequences)), k=len(sequences)))
    chunks = texts.by_length(rows, chunk)
    assert sorted(np.concatenate(chunks).tolist()) == sorted(rows.tolist())
    longest = [max(len(sequences[r]) for r in c) for c in chunks]
    assert longest == sorted(longest)
    for c in chunks:
        ids, mask = texts.padded(c)
        for i, row in enumerate(c):
            assert ids[i][mask[i].bool()].tolist() == sequences[row]
            assert ids[i][~mask[i].bool()].eq(0).all()
