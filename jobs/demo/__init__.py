"""The demo: the whole pipeline on a small world whose every caption can be checked.

`world/` defines scenes (10 colours x 10 shapes x 3 sizes x 8 backgrounds), their pictures, the grammar that decides
what is true, what the web says of them (about half of it wrong, vague or spam), and the site that serves it all on
loopback and fails as a real web does. `weights/` holds a BLIP captioner, a CLIP ranker and a BLIP filter (1.4 million
parameters each, stored in half precision, 8.5 MB in all) in the layouts of the published models, the ViT that the
filter began as (1.4 MB), and the image encoder that the trainings read, a small EVA (1.8 MB); `weights_training/` made
and judges them. `run` builds the corpus, which `corpus_figures` judges; `train_in_pairs` goes on to stage 1 and stage
2, two trainings (`train`) at a time; `held_out` has scenes that nothing was trained on, and `evaluate_training`
measures what was learnt on them.

Captioner and ranker come from these two commands, run at once, each on one thread of a
two-core machine that other work kept more than busy:

    python -m jobs.demo.weights_training.train_weights captioner --until-accuracy 0.88   # 22 min, 2,032 steps
    python -m jobs.demo.weights_training.train_weights ranker --minutes 37               # 37 min, 2,664 steps

The schedule follows the clock, so another machine gets other weights of like
quality. The captioner stops early on purpose: let run on to step 2,608, 98% of
its samples were true, which leaves a ranker little to do.

The trainings read an EVA, not the ranker's CLIP ViT, because transformers' Blip2 has a place for EVA alone: so an
export of the demo loads there. This EVA (`pipeline/models/clip/loader.py`) begins with the ranker's weights and
learns the ranker's features for 600 steps, until the difference is 1% of their variance: about 5 minutes of one thread.
Equal machines get equal weights:

    python -m jobs.demo.weights_training.train_tower

The filter is made as BLIP's is, by the recipes of the demo's size. Step 0 is what BLIP takes from ImageNet: a ViT that
knows labels of pictures (colour, shape, size, ground, and where the object is), and no text; after 4,500 steps it tells
98% of the shapes and 99% of the sizes of new pictures. A MED that begins with it learns from the web's texts and from
true captions, and the filter from that MED and true captions alone. `make weights` makes both, in 21 minutes of one
thread; equal machines get equal weights:

    python -m jobs.demo.weights_training.make_weights --folder weights-training

`python -m jobs.demo.weights_training.evaluate_filter jobs/demo/weights/filter --num-images 500` judges it by the web's
text and ten captions of pictures that no training saw: true are 87% of all these texts and 98.5% of those it keeps; it
keeps 89.9% of the true ones, and its AUC is 0.965.

Stage 2 needs language models that know the grammar and have never seen a
picture (`language`; 280,000 and 330,000 parameters). Each comes from 800 steps on
text alone, about a minute of one thread; equal machines get equal weights:

    python -m jobs.demo.weights_training.train_language opt
    python -m jobs.demo.weights_training.train_language t5

`python -m jobs.demo.weights_training.evaluate_weights --num-images 500`, on pictures that no training saw: entirely
true are 49% of the alt texts, 90% of the ten captions of an image, and 97.5% of the two that are kept. On one thread
of a busy machine, 500 images take 8 seconds to caption ten times and 5 to rank.
"""
