"""A ChatGLM, small and in its own words: tokens come before rows, and `num_layers` counts the blocks."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, hidden_size=128, num_layers=2, num_attention_heads=4, padded_vocab_size=512, **kwargs):
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.num_attention_heads, self.padded_vocab_size = num_attention_heads, padded_vocab_size
        super().__init__(**kwargs)


class SelfAttention(nn.Module):
    """One key and value head for every two query heads: rows of `query_key_value` are q (128), k (32), v (32)."""

    def __init__(self, config):
        super().__init__()
        self.head = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, config.hidden_size + 2 * self.head, bias=True)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        length, rows, width = hidden_states.shape
        mixed = self.query_key_value(hidden_states).view(length, rows, -1, self.head).permute(1, 2, 0, 3)
        q, k, v = mixed.split([width // self.head, 1, 1], dim=1)
        q, k = (x + rotary_pos_emb for x in (q, k))
        out = functional.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
        return self.dense(out.permute(2, 0, 1, 3).reshape(hidden_states.shape)), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 512, bias=False)
        self.dense_4h_to_h = nn.Linear(256, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(config.hidden_size) for _ in range(2))
        self.self_attention, self.mlp = SelfAttention(config), MLP(config)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_cache=None, use_cache=True):
        attended, kv_cache = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb, kv_cache, use_cache
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kv_cache


class GLMTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_layers = config.num_layers
        self.layers = nn.ModuleList([GLMBlock(config) for _ in range(config.num_layers)])
        self.final_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask, rotary_pos_emb, kv_caches=None, use_cache=True):
        kv_caches = kv_caches or [None] * self.num_layers
        for index in range(self.num_layers):
            layer = self.layers[index]
            hidden_states, _ = layer(hidden_states, attention_mask, rotary_pos_emb, kv_caches[index], use_cache)
        return self.final_layernorm(hidden_states)


class Embedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.word_embeddings(input_ids).transpose(0, 1).contiguous()


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        head = config.hidden_size // config.num_attention_heads
        self.register_buffer("turn", torch.linspace(-1, 1, head), persistent=False)

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        hidden_states = self.embedding(input_ids)
        turns = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None] * self.turn
        return self.encoder(hidden_states, None, turns.sin().to(hidden_states.dtype), use_cache=use_cache)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        logits = self.transformer.output_layer(self.transformer(input_ids, attention_mask, use_cache))
        return CausalLMOutputWithPast(logits=logits.transpose(0, 1).contiguous())
