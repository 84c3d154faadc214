/* Ends one inclusion of real.h and rows.h. */
#undef CAT_
#undef CAT
#undef REAL
#undef INT
#undef name
#undef DT_REAL
#undef VL
#undef CB
#undef vec
#undef ivec
#undef LOAD
#undef STORE
#undef SPLAT
#undef VMAX
#undef ROWS
#undef LOADS_HALF
#undef REAL_BITS
