"""Learners with small budgets."""

import pyro_vharm as vh


def importance_weighted(num_particles=50, guide_steps=1000, max_rounds=5, **options):
    return vh.GradientLearner(
        vh.ImportanceWeightedELBO(num_particles),
        max_rounds=max_rounds,
        guide_training=vh.GuideTraining(guide_steps),
        **options,
    )
