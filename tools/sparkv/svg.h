// What the pictures share.
#ifndef SPARKV_TOOLS_SVG_H_
#define SPARKV_TOOLS_SVG_H_

#include <string>

namespace sparkv {

// Text as SVG and HTML take it.
std::string Escape(const std::string& text);
// A <text> element; `style` is put into its tag as it is.
std::string SvgText(double x, double y, const std::string& text, const char* style = "");

}  // namespace sparkv

#endif
