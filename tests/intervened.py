"""The dictionaries and prompts that interventions are tested on: one of each kind."""

SAE = "miniature/resid_post_all/layer_3_width_384_l0_small"
TRANSCODER = "miniature/transcoder_all/layer_2_width_192_l0_big_affine"
ATTENTION = "miniature/attn_out_all/layer_2_width_128_l0_big"
CROSSCODER = "miniature/crosscoder/layer_1_2_3_4_width_384_l0_medium"
CLT = "miniature/clt/width_384_l0_medium_affine"
KINDS = (SAE, TRANSCODER, ATTENTION, CROSSCODER, CLT)
CLEAN = "for item in items:\n    print("
OTHER = "for name in names:\n    print("
METRIC = "difference:item:name"
