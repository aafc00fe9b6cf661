"""AMOS22: fifteen abdominal organs on CT; its MRI, with numbers above 500, belongs to no fold."""

from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation, numbered
from mim3d.scans.intensity import Intensity

LABELS = numbered(
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder",
    "prostate or uterus",
)  # fmt: skip

AMOS22 = Preset(
    name="AMOS22",
    aliases=("AMOS", "AMOS22 CT", "AMOS CT"),
    labels=LABELS,
    num_cases=300,
    spacing_mm=(1.5, 1.5, 2.0),
    intensity=Intensity(window=(-175.0, 250.0)),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.5, shift_prob=0.5),
    files=FileNames(
        image=rf"images(Tr|Va)/amos_(?P<case>\d{{4}}){NIFTI}",
        label=rf"labels(Tr|Va)/amos_(?P<case>\d{{4}}){NIFTI}",
        example="imagesTr/amos_{0}.nii.gz with labelsTr/amos_{0}.nii.gz (or imagesVa and labelsVa)",
    ),
    folds=(
        "14 15 21 23 25 40 43 45 51 60 64 67 70 71 73 86 94 98 111 113 127 128 132 135 143 154 161 162 167 171 "
        "181 186 190 191 194 206 214 217 228 238 242 247 249 255 263 283 302 304 317 321 332 341 353 373 378 380 "
        "383 401 402 410",
        "13 18 19 22 24 35 50 57 63 69 87 89 90 116 125 129 140 142 147 173 180 188 193 195 199 203 207 212 218 "
        "219 225 226 235 258 272 278 280 290 293 307 309 311 316 320 323 326 328 336 346 348 356 357 370 372 385 "
        "390 397 399 405 409",
        "4 5 7 17 32-34 36 41 54 61 66 72 78 85 103 104 110 112 119-121 123 124 126 133 138 150 156 160 170 174 "
        "179 200 204 208 216 230 237 239 244 248 264 268 281 282 288 292 299 301 313 330 337 349 363 365 379 381 "
        "391 400",
        "1 6 9-11 27 42 48 58 75 77 81 84 88 117 131 141 144 149 155 157 159 175 176 192 196 197 202 223 224 231 "
        "254 257 259 273 274 279 286 289 294 296 297 333 334 339 342 352 361 367 374 376 377 384 387 388 392 396 "
        "398 403 404",
        "8 16 29 30 38 44 47 49 52 56 59 76 79 83 92 97 99 102 105 106 108 109 115 118 134 136 137 152 153 158 "
        "166 172 177 184 185 189 198 215 233 245 250 276 284 287 308 310 318 325 344 350 351 358 362 364 366 368 "
        "371 395 406 408",
    ),
    citation=(
        "Ji et al., AMOS: A Large-Scale Abdominal Multi-Organ Benchmark for Versatile Medical Image Segmentation, "
        "NeurIPS Datasets and Benchmarks (2022)"
    ),
    url="https://amos22.grand-challenge.org",
)
