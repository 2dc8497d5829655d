# What an embedder gets: libsparkv.so.0 that exports sparkv_* alone, its header, a CMake package and
# a pkg-config file.
include(CMakePackageConfigHelpers)

# Hidden visibility is not enough: templates of the standard library are visible by its own word.
target_link_options(sparkv PRIVATE LINKER:--version-script=${PROJECT_SOURCE_DIR}/cmake/sparkv.map)
set_property(TARGET sparkv APPEND PROPERTY LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/sparkv.map)

install(TARGETS sparkv EXPORT sparkvTargets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(SPARKV_CUDA)
  target_link_options(sparkv-cuda PRIVATE LINKER:--version-script=${PROJECT_SOURCE_DIR}/cmake/sparkv.map)
  set_property(TARGET sparkv-cuda APPEND PROPERTY LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/sparkv.map)
  install(TARGETS sparkv-cuda EXPORT sparkvTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/sparkv DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h")

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/sparkv)
install(EXPORT sparkvTargets NAMESPACE sparkv:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/sparkvConfig.cmake.in
                              ${PROJECT_BINARY_DIR}/sparkvConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/sparkvConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/sparkvConfig.cmake
              ${PROJECT_BINARY_DIR}/sparkvConfigVersion.cmake
        DESTINATION ${package_dir})

file(RELATIVE_PATH prefix_from_pc /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${PROJECT_SOURCE_DIR}/cmake/sparkv.pc.in ${PROJECT_BINARY_DIR}/sparkv.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/sparkv.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
