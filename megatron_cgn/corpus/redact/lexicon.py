"""Surnames, labels, titles, and the words that begin like a name and are none.

The surnames are those of the traditional list (百家姓) and the census that are still borne.
"""


def longest_first(words: str) -> str:
    """A regular expression for any of some words, of two that match the longer one."""
    return "|".join(sorted(words.split(), key=len, reverse=True))


COMPOUND = (
    "欧阳 太史 端木 上官 司马 东方 独孤 南宫 万俟 闻人 夏侯 诸葛 尉迟 公羊 赫连 澹台 皇甫 宗政 "
    "濮阳 公冶 "
    "太叔 申屠 公孙 慕容 仲孙 钟离 长孙 宇文 司徒 鲜于 司空 闾丘 子车 亓官 司寇 令狐 呼延 南门 "
    "东郭 西门 "
    "完颜 拓跋 轩辕 淳于 百里 东门 左丘 第五 谷梁"
).split()

COMMON = (
    "王李张刘陈杨黄吴赵周徐孙马朱胡林郭何高罗郑梁谢宋唐许邓冯韩曹曾彭萧肖蔡潘田董袁于余叶蒋杜苏魏"
    "程吕丁沈任姚卢"
    "傅钟姜崔谭廖范汪陆金石戴贾韦夏邱方侯邹熊孟秦白江阎闫薛尹段雷黎史龙陶贺顾毛郝龚邵万钱严赖覃洪"
    "武莫孔汤"
)
"""Borne by nearly nine of ten people: enough before a title, without a label."""

OTHER = (
    "向常温康施文牛樊葛邢安齐易乔伍庞颜倪庄聂章鲁岳翟殷詹申欧耿关兰焦俞左柳甘祝包宁尚符舒阮柯纪梅"
    "童凌毕单季裴霍涂成"
    "苗谷盛曲翁冉骆蓝路游辛靳管柴蒙鲍华喻祁蒲房滕屈饶解牟艾尤阳时穆农司卓古吉缪简车项连芦麦褚娄窦"
    "戚岑景党宫费卜冷晏席"
    "卫米柏宗瞿桂全佟应臧闵苟邬边卞姬师和仇栾隋商刁沙荣巫寇桑郎甄丛仲虞敖巩明佘池查麻苑迟邝官封谈"
    "匡鞠惠荆乐冀郁胥南班"
    "储原栗燕楚鄢劳谌奚皮粟冼蔺楼盘满闻位厉伊仝区郜海阚花权强帅屠豆朴盖练廉禹井祖漆巴丰支卿国狄平"
    "计索宣晋相初门云容敬"
    "来扈晁芮都普阙浦戈伏鹿薄邸雍辜羊阿乌母裘亓修邰赫杭况那宿鲜印逯隆茹诸战慕危玉银亢嵇公哈湛宾戎"
    "勾茅利呼居揭干但尉冶"
    "斯元束檀衣信展阴昝智幸奉植衡富尧闭由"
    "卫贲嵇邴糜宓蓬郗羿羊於暨弘曾毋养须巢蒯荀郏别习宦慎戈庾终步满禄殳沃越夔聂融訾空红竺盖益桓付代"
    "揭侬鄞"
    "戴於杭水窦贝滑仰伊暴钭池阴胥双莘贡姬冉雍璩濮寿通扈浦向步都匡文寇广东"
)

SAFE = "|".join(COMPOUND) + (
    "|[许林王李张刘陈杨赵吴周徐孙朱胡郭罗郑梁谢宋唐邓冯韩曹彭萧肖蔡潘董袁蒋杜苏魏吕沈姚卢傅崔谭廖汪"
    "贾韦邱侯邹熊孟阎闫薛尹黎郝龚邵覃]"
)
"""Of the surnames, those that begin few other words: enough after any label."""

NOT_SURNAMES = "于由从向来和同别终步都公那相信空通广国双越益须养但应时全"
"""Surnames that mostly begin another word: names only where a label is set off from them."""

NOT_GIVEN = (
    "部室处科组厂班站院所局司的了是及或与等须被该级泵阀器项者们您你我他她它吗呢吧啊由此即既且仍均"
    "皆各号码量率值型类"
)
"""Characters of which no given name is made."""

WORDS = frozenset(
    (
        "全栈 任免 安全 安装 安排 高压 高级 高度 高温 高工 高中 高效 高层 金属 金额 金融 水工 "
        "水泵 水位 水平 水质 水压 水电 水力 计划 计算 计量 计时 计数 方可 方案 方法 "
        "方式 方向 方面 方能 成立 成功 成品 成本 成员 成套 成果 成绩 成都 全部 全体 "
        "全面 全国 全程 全过程 全厂 常规 常用 常见 常务 时间 时候 时刻 时段 时长 单位 "
        "单元 单独 单价 单号 单据 任务 任何 任意 任职 任命 经理 经验 经过 经济 经营 "
        "明确 明细 明显 明天 明日 通用 通知 通过 通信 项目 国家 国务 平台 平均 平面 "
        "平衡 温度 温控 温差 温升 于是 应该 应急 应用 应力 应当 应付 程序 程度 符合 "
        "符号 解决 解释 解除 元件 和平 能源 能力 能够 管理 管道 管线 管路 管理员 管控 "
        "马达 马力 马上 车间 车辆 车载 车号 石油 石墨 石化 江苏 江西 江门 云南 云平台 "
        "云端 云计算 华北 华东 华南 华中 华龙 海南 海上 海阳 海水 海洋 海外 关于 关键 "
        "关闭 关系 关注 关联 连接 连续 连锁 空气 空调 空白 井口 路线 路由 路径 党委 "
        "党支部 党组 党员 党群 党建 白班 夜班 万元 万能 万用表 严格 严重 严禁 封闭 "
        "封头 封堵 支撑 支架 支持 支付 支部 支管 支路 强度 强制 强化 强调 强电 左右 "
        "左侧 步骤 公司 公用 公式 公告 公开 公称 金工 施工 施工方 施工队 施耐德 安工 "
        "管工 司机 司法 车工 商务 商业 商品 商定 商议 商讨 文件 文档 文字 文本 文化 "
        "文秘 张贴 张力 张紧 张数 周期 周边 周围 周一 周二 周三 周四 周五 周六 周日 "
        "周末 段落 段长 古典 包括 包含 包装 包商 宁波 宁德 边界 边缘 边坡 初始 初步 "
        "初级 初审 初稿 展开 展示 展览 向上 向下 向前 向导 余热 余量 余额 余下 曲线 "
        "曲面 曲轴 阳江 阳极 阳光 阳台 阴极 台山 台账 台架 燕山 秦山 田湾 红沿河 防城港 "
        "岭澳 大亚湾 武汉 武装 汪清 黄色 黄河 黄铜 白色 蓝色 红色 金色 银色 黑色 "
        "银行 龙头 龙门 龙门吊 雷达 雷击 石灰 石膏 钢铁 铁路 毛坯 毛重 毛刺 汤逊 万向 "
        "凌晨 洪水 史料 范围 范例 范本 范畴 程控 程式 陆地 陆上 陆续 林业 林区 "
        "林地 叶片 叶轮 何时 何种 何处 何人 童装 方差 方位 方程 方格 孔径 孔板 孔洞 "
        "孔隙 席位 池水 池底 水池 楼层 楼梯 楼板 房屋 房间 房产 盘点 盘车 盘柜 盘管 "
        "索引 索赔 练习 权限 权重 权利 花费 盖板 盖章 门禁 门诊 印章 印刷 那么 那些 "
        "相关 相应 相同 相对 信息 信号 信用 利用 利润 利率 居民 居中 干部 干燥 干扰 "
        "干式 但是 束流 束缚 由于 富集 富余 战略 战斗 植物 植入 智能 智慧 幸福 奉献 "
        "普通 普查 普遍 来源 来料 来访 都是 薄膜 薄板 伏特 乌鲁木齐 修改 修订 修理 修正 "
        "修复 鲜明 隆重 危险 危害 玉米 公里 勾画 呼叫 呼吸 冶金 冶炼 闭环 闭合 闭式 "
        "闭路 原理 原因 原始 原则 原料 原件 储存 储能 储备 储罐 班组 班长 班次 班前 "
        "南方 南京 南侧 南宁 乐观 惠州 谈判 谈话 官方 官网 查看 查询 查找 查阅 迟到 "
        "迟滞 丛书 桑拿 荣誉 师傅 师资 桂林 米勒 冷却 冷却水 冷却剂 冷源 冷态 冷凝 冷试 "
        "费用 费率 景观 麦克 连队 简介 简图 简称 简单 简化 吉林 农业 农村 时效 时序 "
        "穆斯林 尤其 解体 屈服 华为 华能 华润 华电 柴油 柴油机 柴发 游离 游标 蓝图 盛装 "
        "成分 成形 涂层 涂料 涂装 季度 季节 单相 单机 单根 单轨 毕业 梅花 纪要 纪律 "
        "纪检 纪委 纪录 舒适 尚未 尚需 甘肃 焦点 兰州 关停 关机 欧洲 欧姆 欧盟 申请 "
        "申报 申购 申请人 申请单位 章节 章程 颜色 易损 易燃 易熔 齐全 安徽 葛洲坝 牛顿 "
        "康复 莫氏 钱款 陶瓷 夏季 夏天 韦伯 沈阳 丁字 丁基 苏州 苏打 杜绝 董事 董事长 "
        "董事会 韩国 许可 许可人 许可证 许多 唐山 谢谢 郑州 罗列 罗马 徐州 徐徐 周报 "
        "周检 陈述 陈旧 阿里 区域 区分 区间 区内 海域 海关 朴素 国际 国内 国产 平行 "
        "平稳 平时 平方 平米 宣传 宣布 宣贯 晋级 容器 容量 容积 容许 敬请 浦东 浦项 "
        "元素 元器件 衣物 卫生 卫星 钟表 钟点 江水 江河 任期 金具 金相 金刚 万吨 成都市 "
        "深圳 上海 北京 东莞 龙岗 龙华 宁夏 贵州 广西 湖北 南山 福田 罗湖 曾经 雷电"
        " 水化 暖通 时任 来自 现任 常驻 安防 和田 单项 向心 应变 应聘 党政 管网 管件 管壁 阳逻 "
        "池壁 "
        "代替 修饰 满意 满足 简要 简短 简明 简洁 简历 "
        "通過 金会 金會 丁上 宿舍 班级 班别 党派 宗教 郑重 "
        "谢绝 陈列 胡乱 许久 许诺 郭外 段和 "
        "贝塔 包壳 常温 左岸 井下 车站 强度 冷水 安监 成人 连铸 阴离 阳离 贝氏 奥氏 牛津 章鱼 "
    ).split()
)
"""Words that begin with a surname: 安全 after a label is no Ms 安."""

ROLES = longest_first(
    "监护 申请 确认 姓名 联系人 联络人 编制 编写 编者 起草 拟稿 撰写 撰稿 作者 译者 校核 校对 审核 "
    "审查 审定 审批 审阅 批准 会签 签发 签字 签名 签署 签收 复核 核对 核准 确认人 "
    "负责人 责任人 经办 承办 主办人 主持 主讲 记录 纪要人 整理人 汇报人 报告人 发言人 "
    "参会人员 参会人 参会 参加人员 参加人 与会人员 与会 出席人员 出席 列席 缺席 请假 "
    "到会 操作人 操作员 监护人 监督人 值班 值长 许可人 签发人 工作班成员 工作成员 "
    "作业人员 申请人 收件人 发件人 寄件人 收货人 取货人 送货人 收款人 付款人 户名 "
    "持卡人 开户人 借款人 代理人 代表人 代表 法人 监理 项目经理 技术负责 检查人 检验人 "
    "检修人 检验员 检查员 巡检人 巡检员 验收人 试验人 测量人 测试人 试验员 调试人 "
    "维修人 安装人 焊工 专责 班长 组长 主任 处长 科长 总工 工程师 技术员 安全员 "
    "质检员 采购员 业务员 驾驶员 司机 患者 病人 员工 职工 当事人 被保险人 投保人 "
    "受益人 紧急联系人 配偶 父亲 母亲 导师 学生 主编 副主编 编委 专家 抄送 主送 "
    "报告者 填表 填报 制表 制图 设计 绘图 描图 处理人 发现人 报缺人 验证人 接收人 "
    "交接人 交班 接班 交班人 接班人 甲方 乙方 主管 分管领导 值班人员 当班 授权人 "
    "操纵员 调度员 保管员 仓管员 质量员 施工员 资料员 材料员 监督员 监察员 领班 队长 "
    "领料人 领用人 借用人 举报人 投诉人 来访人 被访人 陪同人 受检者 受训人 学员 讲师 教员 伤者 "
    "车主 户主 医师 医生 护士 律师 "
    "委托人 受托人 承租人 出租人 买方 卖方"
)
"""Labels of persons."""

TITLES = longest_first(
    "先生 女士 小姐 同志 同学 老师 师傅 博士 教授 院士 总工程师 高级工程师 工程师 "
    "总经理 副总经理 经理 董事长 副总 总监 主任 副主任 处长 副处长 科长 副科长 部长 "
    "副部长 院长 副院长 所长 书记 班长 组长 值长 厂长 副厂长 局长 主管"
)
"""Titles that follow a name, and label one before a colon."""

ENGLISH_LABELS = frozenset(
    "technician instructor trainer lecturer worker relief signed foreman superintendent welder "
    "planner buyer seller specialist physicist coordinator officer director president secretary "
    "auditor leader dispatcher rigger nurse physician doctor applicant reporter examiner assessor "
    "tester analyst scientist electrician mechanic translator maintainer maintainers "
    "visitor guest host driver trainee student teacher witness holder "
    "name contact person author authors author(s) attn attention signature engineer manager "
    "supervisor operator inspector attendees participants present chair chairman chairperson "
    "representative sender recipient cardholder employee patient responsible surname".split()
)
ENGLISH_VERBS = frozenset(
    "report authored led prepared reviewed approved checked written signed verified issued "
    "compiled authorized "
    "authorised submitted inspected performed reported requested drawn tested witnessed recorded "
    "drafted edited chaired presented".split()
)
WHOSE_NAME = frozenset(
    "full contact person employee author first last your patient customer applicant holder "
    "cardholder engineer manager supervisor operator inspector owner".split()
)
NOT_PERSONS = frozenset(
    "department division team group committee company ltd inc limited corp corporation office "
    "service "
    "services engineering quality safety nuclear power plant station laboratory institute "
    "university "
    "secretariat agency commission board section unit bureau ministry center centre technical "
    "project "
    "operations maintenance management assurance control system systems design review training "
    "security "
    "energy electric reactor water the this that all none not see to be date number no yes pending "
    "approved general chief senior deputy shift customer support sales help desk public affairs "
    "human "
    "pump valve tank pipe line building room feedwater coolant steam generator turbine pressure "
    "vessel heat exchanger emergency containment fuel core cooling spray primary secondary loop "
    "ci travis github jenkins main dear mr mrs creative commons foundation society association "
    "software free "
    "project contributors "
    "auxiliary model data file type status value note notes results summary introduction method "
    "methods background overview appendix annex section see using new open source first last use "
    "default example input output time "
    "resources test report version revision table figure chapter china "
    "linux kernel news channel irc protocol register serial load balancing modulator weekly "
    "sa ag gmbh llc os dma io cpu incomplete trusted "
    "texas instruments sanitizer website page server client network interface device "
    "republic international national atomic standard standards document procedure".split()
)
"""English words of which no name of a person is made."""
