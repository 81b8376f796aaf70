// From a row of logits to a token, as gpt_dist/inference/sampling.py defines it.

#pragma once

#include <functional>
#include <numeric>
#include <vector>

#include "vector.h"

namespace {

struct Draw {  // one slot's sampling parameters and tokens so far
    float temperature, top_p, log_min_p, repetition, presence, frequency;
    int32_t top_k, logprobs;  // 0: all; -1: none
    int32_t prompt, length;   // tokens in the prompt; generated ones included
    int32_t min_new, stops, biases;
    uint64_t seed;
    int32_t* history;  // prompt and generated tokens; the chosen one is appended
    const int32_t *stop_ids, *bias_ids;
    const float* bias;
};

uint64_t mix(uint64_t z) {  // SplitMix64's finaliser
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double uniform(uint64_t seed, int position) {
    constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
    return (double)(mix(mix(seed + GOLDEN) + position * GOLDEN) >> 32) * 0x1p-32;
}

class Sampler {
  public:
    int vocab;

    explicit Sampler(int vocab) : vocab(vocab), exps(padded(vocab, LANES)), counts(vocab) {}

    // Overwrites logits (vocab). Writes 1 + n log-probabilities and n ids where `draw` asks for n.
    int run(Draw& draw, float* logits, float* logprobs, int32_t* top_ids) {
        x = logits;
        find_maxima();
        float log_sum = 0;
        if (draw.logprobs >= 0) {
            log_sum = top + std::log(exponentials(1, -INFINITY));
            report(draw.logprobs, log_sum, logprobs + 1, top_ids);
            raw.assign(x, x + vocab);
        }
        if (process(draw)) find_maxima();
        int token = draw.temperature > 0 && draw.top_k != 1 ? choose(draw) : first_maximum();
        if (draw.logprobs >= 0) logprobs[0] = raw[token] - log_sum;
        draw.history[draw.length++] = token;
        return token;
    }

  private:
    // A strip is 1,024 logits. A span is every 16th of them, so that a lane holds its maximum.
    static constexpr int SPAN = 64, STRIP = SPAN * LANES;
    float *x, top;
    std::vector<float> maxima, exps, raw, ranked;
    std::vector<double> strips;
    std::vector<int> ids, counts;

    void find_maxima() {
        maxima.resize(padded(vocab, STRIP) / SPAN);
        Vec highest = splat(-INFINITY);
        for (int start = 0; start < vocab; start += STRIP) {
            Vec most = splat(-INFINITY);
            for (int i = start; i < std::min(vocab, start + STRIP); i += LANES)
                most = select(tail(vocab - i), max(most, load(x + i, tail(vocab - i))), most);
            store(&maxima[start / SPAN], most);
            highest = max(highest, most);
        }
        top = reduce_max(highest);
    }

    int first_maximum() const {
        for (int i = 0; i < vocab; i += LANES) {
            const Vec part = load(x + i, tail(vocab - i));
            const Mask maxima = tail(vocab - i) & equal(part, splat(top));
            if (maxima) return i + __builtin_ctz(maxima);
        }
        return 0;  // all logits are NaN
    }

    // Fills `ids`, ascending, with the tokens whose logits are at least `least`.
    void gather(float least) {
        ids.clear();
        for (size_t span = 0; span < maxima.size(); span++) {
            if (maxima[span] < least) continue;
            const int start = span / LANES * STRIP + span % LANES;
            for (int i = start; i < std::min(vocab, start + STRIP); i += LANES)
                if (x[i] >= least) ids.push_back(i);
        }
        std::sort(ids.begin(), ids.end());
    }

    // exps = e^((x - top) / temperature) where x >= least, else 0; returns the sum.
    float exponentials(float temperature, float least) {
        const Vec divisor = splat(temperature), offset = splat(top);
        Vec sum = Vec{};
        for (int i = 0; i < vocab; i += LANES) {
            const Vec value = load(x + i, tail(vocab - i));
            const Mask kept = tail(vocab - i) & at_least(value, splat(least));
            const Vec e = keep(kept, exp((value - offset) / divisor));
            sum += e;
            store(&exps[i], e);
        }
        return reduce_add(sum);
    }

    // Fills `ids`, ascending, with the tokens whose logits are at least the k-th highest, which it
    // returns.
    float collect(int k) {
        // The k spans with the highest maxima hold k values that are at least the k-th maximum.
        float least = -INFINITY;
        if (k < (int)maxima.size()) {
            ranked = maxima;
            std::nth_element(ranked.begin(), ranked.begin() + k - 1, ranked.end(), std::greater<>());
            least = ranked[k - 1];
        }
        gather(least);
        if (k >= (int)ids.size()) return least;
        ranked.clear();
        for (int i : ids) ranked.push_back(x[i]);
        std::nth_element(ranked.begin(), ranked.begin() + k - 1, ranked.end(), std::greater<>());
        const float kth = ranked[k - 1];
        ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int i) { return x[i] < kth; }),
                  ids.end());
        return kth;
    }

    void report(int count, float log_sum, float* logprobs, int32_t* top_ids) {
        if (!count) return;
        collect(std::min(count, vocab));
        std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return x[a] > x[b]; });
        for (int i = 0; i < count; i++) {
            const bool there = i < (int)ids.size();  // false in small vocabularies and for NaN
            top_ids[i] = there ? ids[i] : 0;
            logprobs[i] = there ? x[ids[i]] - log_sum : NAN;
        }
    }

    // Applies biases, penalties and the mask of stop tokens; returns whether any logit changed.
    bool process(const Draw& draw) {
        for (int i = 0; i < draw.biases; i++) x[draw.bias_ids[i]] += draw.bias[i];
        const bool penalties = draw.repetition != 1 || draw.presence != 0 || draw.frequency != 0;
        if (penalties) {
            // counts is 1 + how often a token was generated, and 0 again once it is penalised.
            for (int i = 0; i < draw.length; i++)
                counts[draw.history[i]] = std::max(counts[draw.history[i]], 1) + (i >= draw.prompt);
            for (int i = 0; i < draw.length; i++) {
                const int token = draw.history[i], count = counts[token] - 1;
                if (count < 0) continue;
                x[token] = x[token] < 0 ? x[token] * draw.repetition : x[token] / draw.repetition;
                x[token] -= draw.frequency * count + draw.presence * (count > 0);
                counts[token] = 0;
            }
        }
        const bool masked = draw.stops && draw.length - draw.prompt < draw.min_new;
        if (masked)
            for (int i = 0; i < draw.stops; i++) x[draw.stop_ids[i]] = -INFINITY;
        return draw.biases || penalties || masked;
    }

    int choose(const Draw& draw) {
        const bool few = draw.top_k && draw.top_k < vocab;
        float sum = 0, least = -INFINITY;
        if (few) {
            least = collect(draw.top_k);
            for (int i : ids) sum += exps[i] = std::exp((x[i] - top) / draw.temperature);
        } else {
            sum = exponentials(draw.temperature, least);
        }
        if (draw.top_p < 1) least = std::max(least, nucleus(draw.top_p * sum, least, few));
        least = std::max(least, top + draw.temperature * draw.log_min_p);
        const double u = uniform(draw.seed, draw.length);
        if (few) {
            ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int i) { return x[i] < least; }),
                      ids.end());
            return invert(ids.size(), u, [&](int i) { return ids[i]; });
        }
        if (least > -INFINITY) exponentials(draw.temperature, least);
        // Choose the strip first, then the token in it.
        strips.clear();
        for (int start = 0; start < vocab; start += STRIP) {
            Vec mass = Vec{};
            for (int i = start; i < std::min(vocab, start + STRIP); i += LANES)
                mass += load(&exps[i]);
            strips.push_back(reduce_add(mass));
        }
        double target = u * std::accumulate(strips.begin(), strips.end(), 0.0);
        size_t strip = 0;
        while (strip + 1 < strips.size() && target >= strips[strip]) target -= strips[strip++];
        const int start = strip * STRIP;
        return invert(std::min(vocab - start, STRIP), target / strips[strip],
                      [&](int i) { return start + i; });
    }

    // The first of `count` tokens whose cumulative probability exceeds u.
    template <class F> int invert(int count, double u, F&& token) const {
        double total = 0, mass = 0;
        for (int i = 0; i < count; i++) total += exps[token(i)];
        int last = first_maximum();
        for (int i = 0; i < count; i++) {
            if (exps[token(i)] > 0) last = token(i);
            mass += exps[token(i)];
            if (mass > u * total) return token(i);
        }
        return last;
    }

    // The smallest logit such that the larger ones have less than `wanted` of the mass. Bisects over
    // the bits of floats, which have the same order as the floats.
    float nucleus(float wanted, float kept, bool few) const {
        auto value = [](int32_t key) {
            int32_t bits = key < 0 ? key ^ 0x7FFFFFFF : key;
            float result;
            std::memcpy(&result, &bits, 4);
            return result;
        };
        auto key = [](float value) {
            int32_t bits;
            std::memcpy(&bits, &value, 4);
            return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
        };
        int64_t low = key(std::max(kept, -1e30f)), high = key(top);
        while (low < high) {
            const int64_t middle = (low + high) >> 1;
            if (mass_above(value(middle), few) < wanted)
                high = middle;
            else
                low = middle + 1;
        }
        return value(high);
    }

    float mass_above(float bound, bool few) const {
        if (few) {
            float sum = 0;
            for (int i : ids) sum += x[i] > bound ? exps[i] : 0;
            return sum;
        }
        Vec sum = Vec{};
        for (int i = 0; i < vocab; i += LANES) {
            const Mask inside = tail(vocab - i);
            const Mask counted = inside & above(load(x + i, inside), splat(bound));
            sum += keep(counted, load(&exps[i]));
        }
        return reduce_add(sum);
    }
};

}  // namespace
