"""The sizes that many generators have: of what they are given, and of what they draw around it."""

from typing import Annotated

from pydantic import Field

ImageSize = Annotated[int, Field(description="side of the pictures in pixels; follows from data.image_size")]
SentenceDim = Annotated[int, Field(ge=1, description="numbers in the text encoder's sentence vector; follows from it")]
WordDim = Annotated[int, Field(ge=1, description="numbers in each of the text encoder's word vectors; follows from it")]
NoiseDim = Annotated[int, Field(ge=1, description="numbers in the noise vector z")]
ConditionDim = Annotated[int, Field(ge=1, description="numbers in the condition that is drawn around a caption")]
