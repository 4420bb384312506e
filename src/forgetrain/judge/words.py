"""What each gate asks, in plain words; its numbers and reasons are in docs/judge.md."""

from __future__ import annotations

QUESTIONS = {
    "contract": "Do load, step, loss, state and restore do what the contract says?",
    "G1": "Is every tensor of one step bit for bit the reference's?",
    "G2": "Is a whole trajectory on unseen batches bit for bit the reference's?",
    "G3": "Does what it computes hold across ranks and across a restart?",
    "G4.update": "Does each update follow from the engine's own moments, as AdamW says?",
    "G4.fp32": "In fp32, is it as near to the float64 oracle as the reference is?",
    "G4.bf16": "In bf16, is it as near to the float64 oracle as the reference is?",
    "G4.fp8": "In fp8, is it as near to the float64 oracle as an engine is that is known to be right?",
    "G4": "Is it as near to the float64 oracle as the reference is?",
    "G5": "Trained from the same weights on the same data, does it lose what the reference loses?",
    "G6": "With a hidden seed, does it generalise as the reference does, and repeat itself?",
    "G7.replay": "Are the blocks of the timed run that the judge repeats what the reference computes?",
    "G7": "Is it faster than the champion by more than the noise, and slower than the hardware allows?",
    "G8": "Does its memory stay within the budget?",
    "G9": "Does the command that people run train with it, and lose nothing when it is killed?",
}
