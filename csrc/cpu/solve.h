// SPDX-License-Identifier: Apache-2.0
// Weights of cached values, from sums over all elements: systems of one to three unknowns.
// fastcache/ops/solve.py is the specification.
#pragma once

#include <cmath>
#include <complex>
#include <limits>

#include "guided.h"

namespace fastcache {

// An unknown counts as told by those before it where less than this share of its diagonal is left.
constexpr double SINGULAR = 1e-12;

// w: [order], weights of the differences; returns the misfit. The operations are those of the
// reference, in its order.
inline double differences(const double* sums, const float* prior, int order, double ridge,
                          double* w) {
  constexpr double INFINITE = std::numeric_limits<double>::infinity();
  const double *dq = sums + order * (order + 1) / 2, qq = dq[order];
  double gram[MAX_ORDER][MAX_ORDER], a[MAX_ORDER][MAX_ORDER], r[MAX_ORDER], trace = 0;
  for (int i = 0, m = 0; i < order; ++i)
    for (int j = i; j < order; ++j) gram[i][j] = a[i][j] = sums[m++];
  for (int i = 0; i < order; ++i) trace += gram[i][i];
  const double pull = ridge * trace / order;
  for (int i = 0; i < order; ++i) {
    a[i][i] += pull;
    r[i] = dq[i] + pull * prior[i];
  }
  bool usable = trace + qq < INFINITE;
  for (int p = 0; p < order; ++p) {  // what unknown p says is taken from the rows behind it
    usable = usable && a[p][p] > (gram[p][p] + pull) * SINGULAR;
    for (int i = p + 1; i < order; ++i) {
      const double share = a[p][i] / a[p][p];
      r[i] -= share * r[p];
      for (int j = i; j < order; ++j) a[i][j] -= share * a[p][j];
    }
  }
  for (int p = order - 1; p >= 0; --p) {  // r becomes the solution
    for (int j = p + 1; j < order; ++j) r[p] -= a[p][j] * r[j];
    r[p] /= a[p][p];
  }
  double said = 0;
  for (int j = 0; j < order; ++j) {
    w[j] = usable ? r[j] : prior[j];
    said += w[j] * dq[j];
  }
  double square = qq - 2 * said;
  for (int i = 0; i < order; ++i)
    for (int j = i; j < order; ++j) square += (i == j ? 1 : 2) * w[i] * w[j] * gram[i][j];
  return std::sqrt((square < 0 ? 0 : square) / qq);  // rounding may leave less than 0; NaN stays
}

// weights: [order + 1], those of R_1, R_2, .. in R_1 + sum_j w_j (R_j - R_(j+1)).
inline void of_values(const double* w, int order, float* weights) {
  double before = -1;
  for (int j = 0; j < order; ++j) {
    weights[j] = static_cast<float>(w[j] - before);
    before = w[j];
  }
  weights[order] = static_cast<float>(0 - before);
}

// weights: [order + 1], of the cached values; returns the misfit.
inline double guided_solve(const double* sums, const float* prior, int order, double ridge,
                           float* weights) {
  double w[MAX_ORDER];
  const double misfit = differences(sums, prior, order, ridge, w);
  of_values(w, order, weights);
  return misfit;
}

// The same, drawn to the prior by what both told of the newest value from the older ones. known: sums
// of these values, of order - 1 differences; before: the prior of these.
inline double guided_check(const double* sums, const double* known, const float* prior,
                           const float* before, int order, double ridge, float* weights) {
  constexpr double INFINITE = std::numeric_limits<double>::infinity();
  const int k = order - 1, upper = k * (k + 1) / 2;
  double w[MAX_ORDER], g[MAX_ORDER], d[MAX_ORDER], told[MAX_ORDER * (MAX_ORDER + 3) / 2 + 1];
  const double misfit = differences(sums, prior, order, ridge, w);
  for (int m = 0; m < upper; ++m) told[m] = sums[order + m];
  for (int j = 0; j < k; ++j) told[upper + j] = sums[1 + j];
  told[upper + k] = sums[0];
  differences(told, before, k, ridge, g);
  double gram[MAX_ORDER][MAX_ORDER], total = 0, square = 0, cross = 0;
  for (int i = 0, m = 0; i < k; ++i)
    for (int j = i; j < k; ++j) gram[i][j] = gram[j][i] = known[m++];
  for (int m = 0; m <= upper + k; ++m) total += known[m];
  for (int i = 0; i < k; ++i) d[i] = g[i] - before[i];
  for (int i = 0; i < k; ++i) {
    double left = known[upper + i];
    for (int j = 0; j < k; ++j) {
      square += d[i] * d[j] * gram[i][j];
      left -= gram[i][j] * before[j];
    }
    cross += d[i] * left;
  }
  double share = 1;
  if (square > 0 && total < INFINITE) {
    share = (cross + square) / (2 * square);
    share = share < 0 ? 0 : share > 1 ? 1 : share;
  }
  for (int j = 0; j < order; ++j) w[j] = prior[j] + share * (w[j] - prior[j]);
  of_values(w, order, weights);
  return misfit;
}

// (z^q - 1) / (z - 1): q at 1, and 1 - 0^q at 0.
inline std::complex<double> gained(std::complex<double> z, double q) {
  if (std::norm(z - 1.0) < 1e-12) z = 1 + 1e-6;
  if (std::norm(z) < 1e-24) z = 1e-12;
  const double size = std::exp(q * std::log(std::norm(z)) / 2), angle = q * std::arg(z);
  return std::complex<double>(size * std::cos(angle) - 1, size * std::sin(angle)) / (z - 1.0);
}

// weights: [4], a leading 1 and those of the three newest of evenly spaced values; sums: of a value
// and the three before it.
inline void exponential_solve(const double* sums, double q, double ridge, float* weights) {
  const double m22 = sums[0], m23 = sums[1], m33 = sums[2], v2 = sums[3], v3 = sums[4];
  const double half = (m22 + m33) / 2, diff = (m33 - m22) / 2;
  const double pull = ridge * half, spread = std::sqrt(diff * diff + m23 * m23);
  double u1, u2;
  if (half - spread < 1e-8 * (half + spread)) {  // one direction (e3, e2): half the angle of (diff, m23)
    double e3 = 1, e2 = 0;
    if (spread > 0) {
      const double large = std::sqrt((spread + std::abs(diff)) / (2 * spread));
      const double small = m23 / (2 * spread * large);
      e3 = diff < 0 ? small : large;
      e2 = diff < 0 ? large : small;
    }
    const double largest = half + spread + pull, along = e3 * v3 + e2 * v2;
    const double turn = (e3 * (e3 * m23 + e2 * v3) + e2 * (e3 * m22 + e2 * v2)) / largest;
    const double gain = gained(turn, q).real() * along / largest;
    u2 = e3 * gain;
    u1 = e2 * gain;
  } else {
    const double a = m33 + pull, b = m22 + pull, det = a * b - m23 * m23;
    const double c1 = (b * v3 - m23 * v2) / det, c2 = (a * v2 - m23 * v3) / det;
    // g(C) = alpha + beta C, by the roots of z^2 - c_2 z - c_1; double ones are pulled apart
    const double middle = c2 / 2, square = middle * middle + c1;
    double root = std::sqrt(std::abs(square)), alpha, beta;
    if (square < 0 && root >= 1e-5) {
      const std::complex<double> g = gained({middle, root}, q);
      beta = g.imag() / root;
      alpha = g.real() - beta * middle;
    } else {
      if (root < 1e-5) root = 1e-5;
      const double g1 = gained(middle + root, q).real(), g2 = gained(middle - root, q).real();
      beta = (g1 - g2) / (2 * root);
      alpha = g1 - beta * (middle + root);
    }
    u2 = alpha * c1 + beta * c1 * c2;
    u1 = alpha * c2 + beta * (c1 + c2 * c2);
  }
  if (!(half > 0 && std::isfinite(u1) && std::isfinite(u2))) {
    u1 = q;
    u2 = 0;
  }
  weights[0] = 1;
  weights[1] = static_cast<float>(1 + u1);
  weights[2] = static_cast<float>(u2 - u1);
  weights[3] = static_cast<float>(-u2);
}

}  // namespace fastcache
