"""A task vector of one model, turned so that it fits another (few-shot orthogonal alignment, arXiv 2505.12021).

Beside it two routes that train nothing: least-squares maps between the activations of both models (Theseus, arXiv
2602.12952) and masks by the signs of gradients (GradFix, arXiv 2510.09658).
"""
