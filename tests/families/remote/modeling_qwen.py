"""A first-generation Qwen, small and in its own words: what a checkpoint of a family without a class ships."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class QWenConfig(PretrainedConfig):
    model_type = "qwen"

    def __init__(self, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, **kwargs):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.vocab_size = num_attention_heads, vocab_size
        super().__init__(**kwargs)


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        self.c_attn = nn.Linear(self.width, 3 * self.width, bias=False)
        self.c_proj = nn.Linear(self.width, self.width, bias=False)

    def forward(self, hidden_states, rotary, attention_mask=None, layer_past=None, use_cache=False):
        shape = (*hidden_states.shape[:2], self.heads, -1)
        q, k, v = (x.view(shape).transpose(1, 2) for x in self.c_attn(hidden_states).split(self.width, dim=2))
        q, k = (x * rotary[0] + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * rotary[1] for x in (q, k))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(out.transpose(1, 2).reshape(hidden_states.shape)), (k, v)


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, 256, bias=False)
        self.w2 = nn.Linear(config.hidden_size, 256, bias=False)
        self.c_proj = nn.Linear(256, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.c_proj(self.w1(hidden_states) * functional.silu(self.w2(hidden_states)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.RMSNorm(config.hidden_size, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = QWenAttention(config), QWenMLP(config)

    def forward(self, hidden_states, rotary_pos_emb_list=None, layer_past=None, attention_mask=None, use_cache=False):
        attended, present = self.attn(self.ln_1(hidden_states), rotary_pos_emb_list, attention_mask, layer_past)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.RMSNorm(config.hidden_size, eps=1e-6)
        width = config.hidden_size // config.num_attention_heads
        self.register_buffer("inv_freq", 1e4 ** (-torch.arange(0, width, 2) / width), persistent=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.wte(input_ids)
        angles = torch.outer(torch.arange(input_ids.shape[1], device=input_ids.device), self.inv_freq).repeat(1, 2)
        rotary = [angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)]
        for block in self.h:
            hidden_states = block(hidden_states, rotary_pos_emb_list=rotary, use_cache=use_cache)[0]
        return self.ln_f(hidden_states)


class QWenLMHeadModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.transformer(input_ids, attention_mask, use_cache)))
