// The picture of one head: tokens x channels, what the cache kept and what it pruned.
#ifndef SPARKV_TOOLS_SALIENCY_H_
#define SPARKV_TOOLS_SALIENCY_H_

#include <string>

namespace sparkv {

// `json` is what SPARKV_SALIENCY wrote; `source` names it in errors. Returns a complete <svg>
// element.
std::string DrawSaliency(const std::string& json, const std::string& source);
// The same as a self-contained page.
std::string SaliencyPage(const std::string& svg);

}  // namespace sparkv

#endif
