// The simulated GPU's one stream: what is enqueued runs at once, or, while a graph is captured, at each replay.
#pragma once

#include <functional>
#include <vector>

namespace simulated {

struct Graph {
  std::vector<std::function<void()>> work;
};

extern Graph* capture;  // null: nothing is captured

inline void enqueue(std::function<void()> work) {
  if (capture != nullptr) {
    capture->work.push_back(std::move(work));
  } else {
    work();
  }
}

}  // namespace simulated
