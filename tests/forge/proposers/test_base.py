from tests.forge.proposers.briefs import brief


def test_the_brief_says_goal_contract_profile_failures_and_budget():
    text = brief().markdown()
    for part in (
        "tiny-minicpm5",
        "build(target, *, device, precision, mesh)",
        "attention: 41%",
        "3.1 times the reference's",
        "#1 catalogue: production schedule — elected, 1.800× the champion's speed",
        "8-bit moments",
        "10 minutes, 5 attempts",
    ):
        assert part in text
